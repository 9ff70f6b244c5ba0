"""Confines the processes of one host: namespaces, Landlock, seccomp, memory for keys that nobody else can map."""
