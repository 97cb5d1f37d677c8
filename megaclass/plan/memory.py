"""Memory of one rank by part, and its peak: what exists together in the backward pass of the head and in the update."""

from __future__ import annotations

from megaclass.config import Config
from megaclass.kernels.chunked import chunk_rows, keeps_rows, keeps_slopes
from megaclass.optim.clip import PIECE
from megaclass.plan.backbone import BackboneWork
from megaclass.plan.work import Work
from megaclass.train import build

# Matrices [gathered samples, dim] alive together in the class layer: embeddings sent and gathered, own rows and their
# unit vectors, the sums' gradient, the weighted embeddings, the partial gradient and its copy that travels.
_BATCH_MATRICES = 8
# Logits, slopes and exponents of a chunk; rows, direction and their temporaries.
_CHUNK_LOGITS, _CHUNK_MATRICES = 3, 4
# The dense kernel keeps cosines, exponents, values, slopes and masks at once.
_REFERENCE_LOGITS = 6
# Parts of the class rows in host memory that are on the device at once: this step's, the last one's, the next one's.
_HOST_PARTS = 3
PERSISTENT = ("class rows", "row optimizer state", "rows visiting the device", "backbone parameters",
              "backbone gradients", "backbone optimizer state", "moving average")  # fmt: skip
# What exists beside the persistent parts in the three moments that can be the peak.
BACKWARD = ("backbone activations", "input", "gathered batch", "kept slopes", "kept rows", "chunk scratch",
            "row gradients")  # fmt: skip
MERGE = ("row gradients", "row gradient merge", "freed blocks not given back")
NORM = ("merged row gradients", "gradient norm scratch", "freed blocks not given back")
MOMENTS = {"backward": BACKWARD, "merge": MERGE, "update": NORM}


def state_bytes(config: Config, num_rows: int, dim: int) -> int:
    """Bytes of the row optimizer's state."""
    wide = build.backbone_dtype(config).itemsize
    optim = config.optim
    if optim.class_name == "adamw":
        return num_rows * (2 * dim * wide + 8)
    if optim.class_name == "adagrad":
        return num_rows * wide
    if not optim.momentum:
        return 0
    return num_rows * dim * (2 if optim.row_momentum_dtype == "bfloat16" else wide)


def row_bytes(config: Config, num_rows: int, dim: int) -> int:
    """Bytes of so many class rows."""
    return num_rows * dim * build.row_dtype(config).itemsize


def visiting_bytes(config: Config, work: Work) -> int:
    """Bytes of rows and state that a step brings from the host to the device; 0 where they live on the device."""
    if config.classifier.row_memory == "device":
        return 0
    touched = min(work.num_rows, work.num_touched * work.num_micro)
    return row_bytes(config, touched, work.dim) + state_bytes(config, touched, work.dim)


def host_bytes(config: Config, work: Work, is_cpu: bool) -> int:
    """Bytes of rows and state that lie in the host's memory beside a GPU; 0 where both are the same memory."""
    if config.classifier.row_memory == "device" or is_cpu:
        return 0
    return row_bytes(config, work.num_rows, work.dim) + state_bytes(config, work.num_rows, work.dim)


def parts(config: Config, work: Work, backbone: BackboneWork, is_cpu: bool) -> dict[str, int]:
    """Bytes of every part, by name; they do not all exist at once (`peak`)."""
    wide = build.backbone_dtype(config).itemsize
    dim, is_fused = work.dim, config.optim.row_update == "fused"
    on_host = host_bytes(config, work, is_cpu)
    found = {
        "class rows": 0 if on_host else row_bytes(config, work.num_rows, dim),
        "row optimizer state": 0 if on_host else state_bytes(config, work.num_rows, dim),
        "rows visiting the device": _HOST_PARTS * visiting_bytes(config, work),
        **_backbone_parts(config, work, backbone),
        "backbone activations": backbone.activation_bytes,
        "input": work.batch * config.dataset.channels * config.dataset.image_size**2 * wide,
        "gathered batch": _BATCH_MATRICES * work.num_gathered * dim * wide,
        **_kernel_parts(config, work, wide, "cpu" if is_cpu else "cuda"),
    }
    # Lists of row numbers, int64, go with the gradient of drawn rows: the draw, the weight rows, the gradient's own.
    gradient_bytes = dim * wide + (24 if work.is_sampled else 0)
    touched = 0 if is_fused else work.num_touched
    union = touched
    if work.is_sampled and touched:
        union = round(work.num_rows * (1 - (1 - touched / work.num_rows) ** work.num_micro))
    found["row gradients"] = touched * gradient_bytes * work.num_micro
    found["merged row gradients"] = union * gradient_bytes
    # Gradients of drawn rows are joined in one copy and summed into their union; those of all rows in place.
    is_joined = work.num_micro > 1 and work.is_sampled
    found["row gradient merge"] = found["row gradients"] + found["merged row gradients"] if is_joined else 0
    # On the CPU torch makes a float64 copy of float32 values to take a norm in float64, of one piece at a time.
    found["gradient norm scratch"] = 8 * min(union * dim, PIECE) if is_cpu and wide == 4 else 0
    # Blocks below the allocator's threshold stay in the process's heap after the backward pass.
    retained = found["kept slopes"] + found["kept rows"] + found["chunk scratch"]
    found["freed blocks not given back"] = retained if is_cpu else 0
    return found


def _backbone_parts(config: Config, work: Work, backbone: BackboneWork) -> dict[str, int]:
    """Parameters, gradients, optimizer state and average: whole on every rank, or a part and what is gathered."""
    size, train = backbone.parameter_bytes, config.train
    if train.strategy == "deepspeed" and train.zero_stage != 0 and work.world_size > 1:
        return _zero_parts(config, size, -(-size // work.world_size))
    is_cut = train.strategy == "fsdp" and work.world_size > 1
    held = -(-size // work.world_size) if is_cut else size
    gathered = (backbone.gathered_bytes if train.fsdp_reshard else size) if is_cut else 0
    # Parts: gradients are summed whole before the last micro-batch. DistributedDataParallel has buckets of its own.
    whole = size if train.accumulation_steps > 1 else backbone.gathered_bytes
    travelling = whole if is_cut else size if work.world_size > 1 else 0
    return {
        "backbone parameters": held + gathered,
        "backbone gradients": held + travelling,
        "backbone optimizer state": held * (2 if config.optim.name == "adamw" else 1 if config.optim.momentum else 0),
        "moving average": 0 if config.optim.ema_decay is None else held,
    }


def _zero_parts(config: Config, size: int, held: int) -> dict[str, int]:
    """The same under DeepSpeed from stage 1 on, at most; offloaded parts are counted as if they were on the device.

    The optimizer's part of the parameters is a copy of its own. Stage 3 drops gathered parameters only beyond a billion
    of them (`stage3_max_live_parameters`), and gradients are whole until their bucket is full.
    """
    is_all_cut = config.train.zero_stage == 3
    return {
        "backbone parameters": size + held * (2 if is_all_cut else 1),
        "backbone gradients": size + held,
        "backbone optimizer state": held * (2 if config.optim.name == "adamw" else 1 if config.optim.momentum else 0),
        "moving average": 0 if config.optim.ema_decay is None else size,
    }


def _kernel_parts(config: Config, work: Work, wide: int, device_type: str) -> dict[str, int]:
    batch, rows, dim = work.inter_batch, work.num_candidates, work.dim
    if config.classifier.kernel == "reference":
        return {
            "kept slopes": _REFERENCE_LOGITS * batch * rows * wide,
            "kept rows": 3 * rows * dim * wide,
            "chunk scratch": 0,
        }
    chunk = min(rows, chunk_rows(batch, device_type))
    return {
        "kept slopes": batch * rows * wide if keeps_slopes(batch, rows) else 0,
        "kept rows": rows * dim * wide if keeps_rows(rows if work.is_sampled else None, dim) else 0,
        "chunk scratch": (_CHUNK_LOGITS * batch + _CHUNK_MATRICES * dim) * chunk * wide,
    }


def peak(found: dict[str, int]) -> tuple[int, str]:
    """The largest sum of parts that exist together, in bytes, and when: a key of `MOMENTS`."""
    when = max(MOMENTS, key=lambda moment: sum(alive(found, moment).values()))
    return sum(alive(found, when).values()), when


def alive(found: dict[str, int], when: str) -> dict[str, int]:
    """The parts that exist at a moment."""
    return {name: found[name] for name in (*PERSISTENT, *MOMENTS[when])}
