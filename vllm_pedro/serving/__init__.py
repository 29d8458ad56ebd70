"""Serving without vLLM: adapters in memory, the vector store, the plan of a step, the runtime."""
