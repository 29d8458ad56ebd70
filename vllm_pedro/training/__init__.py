"""Training adapters with transformers' Trainer, and measuring them."""
