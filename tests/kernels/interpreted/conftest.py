"""The tests here run Triton kernels on the CPU; test_interpreter.py starts them in processes of their own.

Triton decides when it is imported whether kernels are interpreted, and the rest of the suite wants the other answer.
"""

import os

collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["test_*.py"]
