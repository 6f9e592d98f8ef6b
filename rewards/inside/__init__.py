"""Scripts that are copied into the sandbox and run there; nothing of Keel exists where they run."""
