"""Environments: tools that the policy calls between its thoughts. `docs/environments.md` shows how to write one."""
