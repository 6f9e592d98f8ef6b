"""What confines a program, run by an interpreter of its own: ``python -I -S -c '...jail.launch...' CONFIG``.

    launch       reads the configuration; where bubblewrap is not there, makes the namespaces itself
    namespaces   mount, process, network, IPC and user namespaces, and a root of read-only binds
    supervise    starts the program, adds up what its processes use, and ends all of them
    confine      the last steps of the process that becomes the program: limits, user, Landlock, seccomp
    landlock     the file system rules of kernels that have them; they need no privilege
    seccomp      the filter of system calls
    syscalls     the C library's door to calls that Python does not have

Only the standard library is imported, and nothing of Keel, as nothing else exists inside.
"""
