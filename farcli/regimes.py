"""Where training stands: fingerprints of activations at fixed probe inputs, and what they say of it (Leap+Verify)."""
