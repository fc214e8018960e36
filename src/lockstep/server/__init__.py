"""The front process: HTTP, tokens to text, API keys. Holds no model."""
