"""Images: resizing, patches and packs, equal to Hugging Face's processor, without torch."""
