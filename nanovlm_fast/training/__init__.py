"""What train.py is made of: setting up, feeding, stepping, saving, and noticing when a rank hangs.

The loop itself is in train.py. See README.md here for scale and reliability.
"""
