"""A folder for the path of engines on CPUs: modules that vLLM's imports ask for and a language model never uses."""
