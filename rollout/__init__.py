"""Generation: the engine protocol, the embedded torch engine and its actors, and conversations."""
