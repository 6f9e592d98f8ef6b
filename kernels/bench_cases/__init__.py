"""What `python -m kernels.bench` measures: one module a kernel, each with a function `cases() -> list[Case]`."""
