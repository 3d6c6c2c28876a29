"""The doctor's questions about this machine: has the agent what it needs, and what do its tasks meet here?"""

from typing import Final

from meshq import config
from meshq.doctor import network
from meshq.doctor.facts import Check, Facts, fine, wrong

HEALTH_MAX: Final = 2  # of 7 points; a lost packet or two are no reason to worry anybody
STALLS_MIN: Final = 3
STALL_EVERY: Final = 600.0  # seconds; an agent that is held up oftener than that has too little CPU
FILES_MIN: Final = 1_024  # connections at their limit, and room for logs and databases
FILES_SHARE_MAX: Final = 0.8
FREE_FILES_MIN: Final = 1_000
SHARED_DISKS: Final = (
    "nfs", "cifs", "smb", "afs", "9p", "ceph", "glusterfs", "lustre", "gpfs", "beegfs",
    "fuse.sshfs", "fuse.ceph", "fuse.glusterfs",
)  # fmt: skip
MEMORY_DISKS: Final = ("tmpfs", "ramfs")
NO_DRIVER: Final = "no NVIDIA driver"  # how a machine without GPUs reads (`meshq.exec.gpus`)
GPUS_NAMED_MAX: Final = 4


def health(facts: Facts) -> Check:
    """Has the agent enough CPU to answer in time?"""
    minutes, often = facts.running_seconds / 60, facts.stalls * STALL_EVERY > facts.running_seconds
    fix = "leave a core free with `meshq join --cpus`, or give the agent more weight (`renice`, `CPUWeight=` of its unit)"
    if facts.health > HEALTH_MAX and not network.isolated(facts):
        detail = f"answers come late (score {facts.health} of 7): this agent lacks CPU or loses packets, and probes seldom"
        return wrong("health", detail, fix)
    if often and facts.stalls >= STALLS_MIN:
        detail = (
            f"the agent was held up {facts.stalls} times in {minutes:.0f} min: it lacks CPU, and others may take it for dead"
        )
        return wrong("health", detail, fix)
    if facts.health > HEALTH_MAX:
        return fine("health", f"nobody answers (score {facts.health} of 7), as this machine has no network: see `addresses`")
    held = f"; held up {facts.stalls} times so far" if facts.stalls else ""
    return fine("health", f"answers come in time (score {facts.health} of 7){held}")


def files(facts: Facts) -> Check:
    """May the agent open enough files?"""
    now = facts.measured.files
    fix = "raise the limit (`ulimit -n`, or `LimitNOFILE=` of its unit) and start the agent again"
    if not now.limit:
        return fine("files", "the limit is not known")
    if now.limit < FILES_MIN:
        return wrong("files", f"the agent may open only {now.limit} files; a busy mesh needs {FILES_MIN}", fix)
    if now.open > FILES_SHARE_MAX * now.limit:
        return wrong("files", f"{now.open} of at most {now.limit} files are open: soon connections will be refused", fix)
    return fine("files", f"{now.open} of at most {now.limit} open")


def disk(facts: Facts) -> Check:
    """Is there room, and is it a disk that a database may be on?"""
    now, home = facts.measured.disk, facts.home
    if now.kind.startswith(SHARED_DISKS):
        detail = f"{home} is on a network file system ({now.kind}), where the queue's database is not safe"
        return wrong("disk", detail, "set MESHQ_HOME to a folder on a disk of this machine, and join there")
    if now.free_bytes is None:
        return fine("disk", f"free space in {home} is not known")
    text = f"{now.free_bytes / 2**30:.1f} GiB free in {home}"
    if now.free_bytes < config.DISK_FREE_BYTES_MIN:
        detail = f"{text}: no task is claimed below {config.DISK_FREE_BYTES_MIN >> 20} MiB"
        return wrong("disk", detail, "make room; `environments` and `packages` there may be deleted while no agent runs")
    if now.free_files is not None and now.free_files < FREE_FILES_MIN:
        return wrong("disk", f"{text}, but only {now.free_files} more files fit (inodes)", "delete folders of many small files")
    return fine("disk", text + (f", in memory ({now.kind}): a reboot loses it" if now.kind in MEMORY_DISKS else ""))


def ledger(facts: Facts) -> Check:
    """Did the disk give back what the queue's database was given?"""
    if not facts.damage:
        return fine("ledger", "nothing that was stored came back damaged")
    found = ", ".join(f"{name.replace('_', ' ')}: {count}" for name, count in sorted(facts.damage.items()))
    detail = f"the disk of {facts.home} damaged the queue's database ({found}); it was written or fetched again"
    fix = "look at the disk (`smartctl -a`, `dmesg`); what was damaged lies in `ledger.sqlite.damaged-*` and may be deleted"
    return wrong("ledger", detail, fix)


def gpus(facts: Facts) -> Check:
    """Do GPUs and their driver work?"""
    seen, state = facts.telemetry.gpus, facts.gpu_state
    if not facts.gpus_wanted:
        return fine("gpus", "none given to tasks (--gpus none)")
    if state.startswith(NO_DRIVER) and state != NO_DRIVER:
        return wrong("gpus", state, "install NVIDIA's driver, or join with `--gpus none` if tasks shall not have it")
    if state and state != NO_DRIVER:
        fix = "see what `nvidia-smi` says (after an update of the driver a reboot helps), or join with `--gpus none`"
        return wrong("gpus", f"no GPU can be used: {state}", fix)
    if faulty := _faulty_gpus(facts):
        return faulty
    if not seen:
        return fine("gpus", f"none: {state or 'NVML sees none'}")
    used = sum(1 for gpu in seen if gpu.foreign_pids)
    return fine("gpus", f"{len(seen)} seen, {used} used by other processes")


def _faulty_gpus(facts: Facts) -> Check | None:
    """Those that fail and those in MIG mode, all in one finding: one must not hide the other."""
    seen, faults = facts.telemetry.gpus, sorted(facts.gpu_faults.items())
    parted = [gpu.index for gpu in seen if gpu.mig_mode and gpu.index not in facts.gpu_faults]
    what = [f"GPU {index}: {problem}" for index, problem in faults[:GPUS_NAMED_MAX]]
    fixes = ["see what `nvidia-smi` says of it"] if faults else []
    if parted:
        which = ", ".join(map(str, parted[:GPUS_NAMED_MAX]))
        what.append(f"in MIG mode: GPU {which}")
        fixes.append(f"switch MIG off (`nvidia-smi -i {which.replace(' ', '')} -mig 0`)")
    if not what:
        return None
    detail = f"{len(faults) + len(parted)} of {len(seen)} can't be used: {'; '.join(what)}"
    return wrong("gpus", detail, f"{'; '.join(fixes)}; or leave it out with `meshq join --gpus`")


def docker(facts: Facts) -> Check:
    """Could tasks run in containers?"""
    found = facts.measured.docker
    if found.path and not found.problem:
        return fine("docker", f"{found.version} at {found.path}")
    lack = f"{found.path} is of no use ({found.problem})" if found.path else "there is no docker socket"
    if not found.wanted:
        return fine("docker", f"{lack}, and none is wanted")
    fix = "install docker and start it"
    if found.path:
        fix = "put the agent's user into the group docker (which is as good as root)" if found.denied else "look at its service"
    return wrong("docker", f"tasks are to run in containers, but {lack}", fix)


def environments(facts: Facts) -> Check:
    """Is uv there, which builds the environments of tasks?"""
    if facts.uv is None:
        detail = "uv is missing, so no environment of a task can be built"
        return wrong("environments", detail, "reinstall meshq in a fresh virtual environment")
    return fine("environments", f"uv at {facts.uv}")


def git(facts: Facts) -> Check:
    """Is there a git, which is quicker than what stands in for it?"""
    return fine("git", facts.measured.git or "no git; dulwich does its work, slower on large trees")


def isolation(facts: Facts) -> Check:
    """Are the mesh's secrets hidden from tasks?"""
    if facts.landlock_abi < 1:
        detail = "this kernel has no Landlock that serves, so tasks can read the mesh key in the home"
        return wrong("isolation", detail, "boot a kernel of version 5.19 or newer, with `landlock` in its `lsm=` list")
    return fine("isolation", f"tasks do not see the home (Landlock ABI {facts.landlock_abi})")


def user(facts: Facts) -> Check:
    """As whom do tasks run?"""
    if facts.uid == 0:
        return wrong("user", "the agent runs as root, and so does every task", "join as a user made for it")
    shared = f"; members of group {facts.group} may submit here, too" if facts.group else ""
    return fine("user", f"tasks run as uid {facts.uid}{shared}")


def claims(facts: Facts) -> Check:
    """Does this peer take tasks?"""
    told = facts.telemetry
    if not facts.sampled:
        return fine("claims", "this machine is not measured yet")
    if told.problem:
        return wrong(
            "claims",
            f"this peer claims nothing: {told.problem}",
            "mend that (a silent copy must be started again); it claims again by itself",
        )
    if told.draining:
        return fine("claims", "this peer is draining: it finishes what runs and claims nothing")
    return fine("claims", f"serves {', '.join(told.queues) or 'no queue'}")
