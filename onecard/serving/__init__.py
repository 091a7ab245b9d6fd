"""The HTTP service: keys, store, OpenAI and TigerBot calls, jobs, knowledge."""
