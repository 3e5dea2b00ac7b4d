"""Files: nested values as safetensors, and the formats of others."""
