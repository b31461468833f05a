"""The Qwen2-VL family in Flax: configuration, vision tower, decoder, images, positions and checkpoints."""
