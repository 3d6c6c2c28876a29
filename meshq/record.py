"""What a peer says about itself as bytes: one record of at most RECORD_BYTES_MAX, which must fit one packet.

A record is a `Telemetry` in MessagePack, deflated where that is shorter: records are full of zeros, of names that every
machine has, and of what a machine with eight equal GPUs says eight times (a busy one: 1,500 bytes become 800). Which of the
two it is shows in the first byte, so plain records stay readable. The dictionary of the deflated ones must never change: a
better one gets a mark of its own.

What does not fit is left out in a fixed order: first what only people read, details before names; what placement reads goes
last, and only beside the longest labels and queues that `settings.check` lets pass: then the last of many GPUs are not told.
"""

import zlib
from collections.abc import Callable
from dataclasses import replace
from typing import Final

from meshq import codec, config
from meshq.errors import MalformedData
from meshq.task import Gpu, MigInstance, Telemetry, Versions

PLAIN_BYTES_MAX: Final = 8 * 1024  # of a record when inflated; 16 GPUs with all their MIG instances need 5,000
_DEFLATED: Final = b"\xc1"  # no MessagePack begins like this
_DICTIONARY: Final = (
    b"services aarch64 x86_64 -generic -amd64 ubuntu 24.04 ubuntu 22.04 debian 12 NVIDIA A100-SXM4-80GB NVIDIA H100 80GB HBM3"
    b" NVIDIA RTX 6000 Ada Generation NVIDIA GeForce RTX 3090 NVIDIA GeForce RTX 4090 GPU- MIG- 1g.10gb strict default gpu"
    # and the plain records of two usual machines, one with a busy GPU and one without
    b"\xdc\x00\x1e\x01\x92\xa7default\xa3gpu\xa6strict\xc2\x01\x01\x01\x01\xcf\x00\x00\x00\x10\x00\x00\x00\x00\xcf"
    b"\x00\x00\x00\x10\x00\x00\x00\x00\x91\x9e\x00\xa4GPU-\xb7NVIDIA GeForce RTX 4090\xcf\x00\x00\x00\x05\xff@\x00"
    b"\x00\xce\x00P\x00\x00\x00(\x14\xb0aaaaaaaaaaaaaaaa\x90\x91\x95\xce\x00\x01\x11p\xa3ann\xb0aaaaaaaaaaaaaaaa"
    b"\xce@\x00\x00\x00\xc2\x90\xc2\xa0\x00\x80\x00\x90\x03\xcf\x00\x00\x00\x04\x00\x00\x00\x00\xcb?\xe0\x00\x00"
    b"\x00\x00\x00\x00\xcf\x00\x00\x01\x00\x00\x00\x00\x00\x00\xce\x00\x01\x86\xa0\xce\x00\x01\x11p\xce\x00\x01\x11"
    b"p\xa0\x91\xa800000000\xa800000000\xa0\x96\xa63.12.3\xb06.8.0-41-generic\xacubuntu 24.04\xa9550.54.14\xa412.4"
    b"\xa0\x90\xcbA\xda\xacN\xe0\x00\x00\x00\xdc\x00\x1e\x01\x91\xa7default\xa6strict\xc2\x01\x01\x01\x01\xcf\x00"
    b"\x00\x00\x10\x00\x00\x00\x00\xcf\x00\x00\x00\x10\x00\x00\x00\x00\x90\x00\x80\x00\x90\x03\xcf\x00\x00\x00\x04"
    b"\x00\x00\x00\x00\xcb?\xe0\x00\x00\x00\x00\x00\x00\xcf\x00\x00\x01\x00\x00\x00\x00\x00\x00\xce\x00\x01\x86\xa0"
    b"\xce\x00\x01\x11p\xce\x00\x01\x11p\xa0\x91\xa800000000\xa800000000\xa0\x96\xa63.12.3\xb06.8.0-41-generic\xacu"
    b"buntu 24.04\xa0\xa0\xa0\x90\xcbA\xda\xacN\xe0\x00\x00\x00"
)


def pack(telemetry: Telemetry) -> bytes:
    """The record; it fits if `fitted` made the telemetry."""
    return _packed(codec.encode(telemetry))


def _packed(plain: bytes) -> bytes:
    deflater = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS, 9, zlib.Z_DEFAULT_STRATEGY, _DICTIONARY)
    deflated = _DEFLATED + deflater.compress(plain) + deflater.flush()
    return min(plain, deflated, key=len)


def unpack(record: bytes) -> Telemetry:
    """MalformedData for everything that is no record."""
    if len(record) > config.RECORD_BYTES_MAX:
        raise MalformedData(f"a record of {len(record)} bytes where at most {config.RECORD_BYTES_MAX} are allowed")
    plain = _inflated(record[1:]) if record.startswith(_DEFLATED) else record
    telemetry: Telemetry = codec.decode(Telemetry, plain, bytes_max=PLAIN_BYTES_MAX)
    return telemetry


def _inflated(data: bytes) -> bytes:
    """At most PLAIN_BYTES_MAX, however much it would become."""
    inflater = zlib.decompressobj(-zlib.MAX_WBITS, _DICTIONARY)
    try:
        plain = inflater.decompress(data, PLAIN_BYTES_MAX)
    except zlib.error as error:
        raise MalformedData(f"cannot inflate a record: {error}") from None
    if not inflater.eof or inflater.unused_data:
        raise MalformedData("a record that is cut off, too long when inflated, or followed by something")
    return plain


def fitted(telemetry: Telemetry) -> Telemetry:
    """The same, cut down until it fits one packet."""
    for cut in CUTS:
        if _fits(telemetry):
            return telemetry
        telemetry = cut(telemetry)
    while telemetry.gpus and not _fits(telemetry):
        telemetry = replace(telemetry, gpus=telemetry.gpus[:-1])
    return telemetry


def _fits(telemetry: Telemetry) -> bool:
    plain = codec.encode(telemetry)
    return len(plain) <= PLAIN_BYTES_MAX and len(_packed(plain)) <= config.RECORD_BYTES_MAX


def _each_gpu(telemetry: Telemetry, change: Callable[[Gpu], Gpu]) -> Telemetry:
    return replace(telemetry, gpus=tuple(map(change, telemetry.gpus)))


def _with_fewer_environments(telemetry: Telemetry) -> Telemetry:
    return replace(telemetry, environments=telemetry.environments[:4])


def _with_few_processes(telemetry: Telemetry) -> Telemetry:
    """One foreign process says as much to placement as ten; people see the one that matters most."""
    return _each_gpu(telemetry, lambda gpu: replace(gpu, foreign_pids=gpu.foreign_pids[:1], processes=gpu.processes[:1]))


def _with_fewer_running(telemetry: Telemetry) -> Telemetry:
    return replace(telemetry, running=telemetry.running[:8])


def _without_details(telemetry: Telemetry) -> Telemetry:
    bare = _each_gpu(telemetry, lambda gpu: replace(gpu, processes=(), mig=tuple(map(_short_instance, gpu.mig))))
    return replace(bare, environments=(), versions=Versions())


def _short_instance(instance: MigInstance) -> MigInstance:
    """Placement reads what it has and whether somebody uses it."""
    return replace(instance, uuid=instance.uuid[:12], memory_used_bytes=None, foreign_pids=instance.foreign_pids[:1])


def _with_short_gpus(telemetry: Telemetry) -> Telemetry:
    """Sixteen UUIDs alone take 320 bytes."""
    return _each_gpu(telemetry, _short)


def _short(gpu: Gpu) -> Gpu:
    return replace(gpu, uuid=gpu.uuid[:12], name=gpu.name[:24], power_w=None, temperature_c=None, problem=gpu.problem[:24])


def _with_bare_gpus(telemetry: Telemetry) -> Telemetry:
    """What placement reads of a GPU, and nothing else."""
    return replace(_each_gpu(telemetry, _bare), running=(), gpu_problem=telemetry.gpu_problem[:24])


def _bare(gpu: Gpu) -> Gpu:
    instances = tuple(replace(each, uuid="") for each in gpu.mig)
    return Gpu(
        index=gpu.index, uuid="", name="", memory_bytes=gpu.memory_bytes, task=gpu.task, foreign_pids=gpu.foreign_pids,
        mig=instances, mig_mode=gpu.mig_mode, problem=gpu.problem,
    )  # fmt: skip


def _without_usage(telemetry: Telemetry) -> Telemetry:
    return replace(
        telemetry,
        cpu_percent=None,
        memory_used_bytes=None,
        load_1m=None,
        disk_free_bytes=None,
        disk_read_bps=None,
        disk_write_bps=None,
        net_rx_bps=None,
        net_tx_bps=None,
    )


CUTS: Final = (
    _with_fewer_environments, _with_few_processes, _with_fewer_running, _without_details,
    _with_short_gpus, _with_bare_gpus, _without_usage,
)  # fmt: skip
"""In the order in which they are made."""
