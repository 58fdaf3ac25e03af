"""ChatGLM3."""
