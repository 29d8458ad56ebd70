"""A PEDRO adapter that imitates a LoRA adapter, another PEDRO adapter or a fine-tuned backbone.

The teacher answers prompts, what it found likely is kept on disk, and a student learns from that.
"""
