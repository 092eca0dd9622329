"""The recorder and leaping inside other people's training loops."""
