"""Which system calls a tested program may not make: a seccomp filter, as the bytes that prctl(PR_SET_SECCOMP) takes.

An answer to a coding problem computes, reads its input and writes its output. So it stays one process (threads are fine),
starts no other program, opens no socket, sends no signal, and changes no other process. What is refused here fails with
"permission denied", an exception that the program sees. Numbers are those of Linux's asm/unistd_64.h and
asm-generic/unistd.h; the meaning of the opcodes is in linux/filter.h and Documentation/userspace-api/seccomp_filter.rst.
"""

import platform
import struct

# machine -> (AUDIT_ARCH constant of linux/audit.h, column of _DENIED and of _CHECKED)
MACHINES = {"x86_64": (0xC000003E, 0), "aarch64": (0xC00000B7, 1)}

_DENIED = {  # name: (x86_64, aarch64); None = the machine has no such call
    # another process, or another program in this one
    "fork": (57, None), "vfork": (58, None), "execve": (59, 221), "execveat": (322, 281), "setsid": (112, 157),
    "setpgid": (109, 154), "unshare": (272, 97), "setns": (308, 268), "mount": (165, 40),
    # a signal to, or a look into, a process that is there already
    "kill": (62, 129), "tkill": (200, 130), "tgkill": (234, 131), "rt_sigqueueinfo": (129, 138),
    "rt_tgsigqueueinfo": (297, 240), "pidfd_send_signal": (424, 424), "pidfd_open": (434, 434), "pidfd_getfd": (438, 438),
    "ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271), "process_madvise": (440, 440),
    "kcmp": (312, 272),
    # the network, and io_uring, which makes calls that no filter sees
    "socket": (41, 198), "io_uring_setup": (425, 425),
    # memory that RLIMIT_AS does not count, or that outlives the process
    "memfd_create": (319, 279), "memfd_secret": (447, 447), "shmget": (29, 194), "msgget": (68, 186), "semget": (64, 190),
    "mq_open": (240, 180), "add_key": (248, 217), "request_key": (249, 218), "keyctl": (250, 219),
    # large, rarely audited doors into the kernel
    "bpf": (321, 280), "perf_event_open": (298, 241), "userfaultfd": (323, 282),
}  # fmt: skip
_CHECKED = {"clone": (56, 220), "clone3": (435, 435), "prlimit64": (302, 261), "fcntl": (72, 25), "ioctl": (16, 29)}

_X32_CALLS = 0x40000000  # x86_64 knows every call under a second number, from here on
_CLONE_THREAD = 0x10000
# F_SETOWN, F_SETOWN_EX; FIOSETOWN, SIOCSPGRP: with these a process of one's choice gets a signal of one's choice.
_SIGNAL_ON_INPUT = {"fcntl": (8, 15), "ioctl": (0x8901, 0x8902)}
_NO_PERMISSION, _NO_SUCH_CALL = 1, 38  # EPERM, ENOSYS

_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_ALLOW, _KILL, _ERROR = 0x7FFF0000, 0x80000000, 0x00050000
_NUMBER_AT, _MACHINE_AT = 0, 4  # bytes in struct seccomp_data; argument i is at 16 + 8 * i


def filter_bytes(machine=None):
    """struct sock_filter[n], for the machine it runs on unless another is named.

    Raises:
        ValueError: a machine whose numbers are not known here.
    """
    machine = machine or platform.machine()
    if machine not in MACHINES:
        known = " or ".join(MACHINES)
        raise ValueError(f"machine {machine!r}: programs are tested on {known} only; leave code problems out.")
    architecture, column = MACHINES[machine]
    checked = {name: numbers[column] for name, numbers in _CHECKED.items()}
    steps = [(_LOAD, 0, 0, _MACHINE_AT), (_EQUAL, 1, 0, architecture), (_RETURN, 0, 0, _KILL), (_LOAD, 0, 0, _NUMBER_AT)]
    if machine == "x86_64":
        steps += [(_AT_LEAST, 0, 1, _X32_CALLS), (_RETURN, 0, 0, _ERROR | _NO_PERMISSION)]
    for numbers in _DENIED.values():
        if numbers[column] is not None:
            steps += _when(numbers[column], [(_RETURN, 0, 0, _ERROR | _NO_PERMISSION)])
    # The C library takes "no such call" as word to use clone, whose flags are visible here; clone3 keeps them in memory.
    steps += _when(checked["clone3"], [(_RETURN, 0, 0, _ERROR | _NO_SUCH_CALL)])
    steps += _when(checked["clone"], _deny_unless([(_ANY_BIT, _CLONE_THREAD)], argument=0))
    steps += _when(checked["prlimit64"], _deny_unless([(_EQUAL, 0)], argument=0))  # 0 = the caller itself
    for name, commands in _SIGNAL_ON_INPUT.items():
        steps += _when(checked[name], _deny_if(commands, argument=1))
    steps.append((_RETURN, 0, 0, _ALLOW))
    return b"".join(struct.pack("<HBBI", code, yes, no, value) for code, yes, no, value in steps)


def _when(number, steps):
    """`steps`, which must end in a return, for one call; the others jump over them."""
    return [(_EQUAL, 0, len(steps), number), *steps]


def _deny_unless(tests, argument):
    """Allows where one of the (opcode, value) tests holds of the lower half of an argument."""
    allow = [step for code, value in tests for step in ((code, 0, 1, value), (_RETURN, 0, 0, _ALLOW))]
    return [(_LOAD, 0, 0, 16 + 8 * argument), *allow, (_RETURN, 0, 0, _ERROR | _NO_PERMISSION)]


def _deny_if(values, argument):
    deny = [step for value in values for step in ((_EQUAL, 0, 1, value), (_RETURN, 0, 0, _ERROR | _NO_PERMISSION))]
    return [(_LOAD, 0, 0, 16 + 8 * argument), *deny, (_RETURN, 0, 0, _ALLOW)]
