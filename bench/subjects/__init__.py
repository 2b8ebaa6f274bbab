"""What is compared: work, variants, rivals."""
