"""The demo: pretrained towers from two PyPI packages, fine-tuned on pictures of emoji."""
