"""The server: OpenAI's chat completions over HTTP, batch files, and a page to try a model on."""
