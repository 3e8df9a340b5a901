"""Claims of the GPU benchmark; one whose rows were not measured is left out."""

from __future__ import annotations

from tools.result_files import claim


BLOCKS_8B = 32
OURS = "freeact-fastest"  # the tier whose speed is claimed; the others' rows stand beside it


def ratio(rows: list[dict], k: int, m: int, n: int) -> float | None:
    """Time of a bf16 linear over ours."""
    found = {
        r["provider"]: r["value"] for r in rows if r.get("what") == "linear" and (r["k"], r["m"], r["n"]) == (k, m, n)
    }
    ours, theirs = found.get(OURS), found.get("bf16")
    return theirs / ours if ours and theirs else None


def model_values(rows: list[dict], metric: str, layers: int, ours: str = OURS) -> dict[str, list[float]]:
    """Values of a metric per provider, of all ways to run the model."""
    found: dict[str, list[float]] = {}
    for row in rows:
        if row.get("what") == "model" and row["metric"] == metric and row.get("layers") == layers and row["value"]:
            found.setdefault(row["provider"], []).append(row["value"])
    return found if {"bf16", ours} <= found.keys() else {}


def memory_speed(rows: list[dict]) -> float | None:
    """Bytes a second of the memory: as a kernel reads them that does nothing else."""
    found = {row["provider"]: row["value"] for row in rows if row.get("what") == "roof"}
    return found.get("read") or max(found.values(), default=None)


def linear_claims(rows: list[dict]) -> list[dict]:
    """Whole linears and the share of the memory roof."""
    found = []
    for k, m, target in ((4096, 14336, 1.5), (14336, 4096, 1.5), (4096, 4096, 1.3)):
        values = [value for n in (2048, 8192) if (value := ratio(rows, k, m, n)) is not None]
        if values:
            how = f"microseconds of a whole linear, bf16 / {OURS}, the least of 2048 and 8192 tokens"
            found.append(claim(f"speed.linear.prefill_{k}x{m}", min(values), ">=", target, how))
    for n in (1, 16):
        value = ratio(rows, 4096, 14336, n)
        if value is not None:
            how = f"microseconds of a whole linear, bf16 / {OURS}, {n} tokens"
            found.append(claim(f"speed.linear.decode_4096x14336_m{n}", value, ">=", 2.5, how))
    bandwidth = memory_speed(rows)
    times = [
        row["value"]
        for row in rows
        if (row.get("what"), row["provider"]) == ("kernel", f"{OURS} product")
        and (row["k"], row["m"], row["n"]) == (4096, 14336, 1)
        and row["value"]
    ]
    if bandwidth and times:
        share = 4096 * 14336 / 2 / (bandwidth * times[-1] * 1e-6)
        how = (
            "bytes of the packed weight / (bytes a second x time of the product), 1 token, 4096 x 14336; bytes a second "
            "of a kernel that only reads, over a gigabyte (where none was measured: of a copy or of the datasheet, the greater)"
        )
        found.append(claim("speed.decode_roof_share", share, ">=", 0.60, how))
    return found


def model_claims(rows: list[dict]) -> list[dict]:
    """The 8B shape: the best way to run each provider counts."""
    found = []
    held = model_values(rows, "weight_bytes", BLOCKS_8B)
    peak = model_values(rows, "peak_bytes", BLOCKS_8B)
    if held and peak:
        value = max(min(held[OURS]) / min(held["bf16"]), min(peak[OURS]) / min(peak["bf16"]))
        how = (
            f"bytes on the GPU, {OURS} / bf16, the greater of weights and peak of a prefill; ours with embedding_bits=8: "
            "embeddings and head in one byte a number, bf16's in two"
        )
        found.append(claim("speed.model8b.memory_ratio", value, "<=", 0.33, how))
    for name, metric, target in (("decode", "decode_seconds", 2.0), ("prefill", "prefill_seconds", 1.3)):
        values = model_values(rows, metric, BLOCKS_8B)
        if values:
            how = f"{metric}, bf16 / {OURS}, each at its best of eager, CUDA graph and torch.compile; ours with embedding_bits=8"
            found.append(claim(f"speed.model8b.{name}", min(values["bf16"]) / min(values[OURS]), ">=", target, how))
    return found


def calibration_claims(rows: list[dict]) -> list[dict]:
    """Minutes for all blocks of the 8B shape, and the gain of a second GPU."""
    found = {
        (r["gpus"], r["metric"]): r["value"]
        for r in rows
        if r.get("what") == "calibration" and r["shape"] == "8b" and r.get("preset", "freeact-fast") == "freeact-fast"
    }
    claims = []
    if (1, "block_seconds") in found:
        minutes = (BLOCKS_8B * found[1, "block_seconds"] + found[1, "once_seconds"]) / 60
        how = f"({BLOCKS_8B} x block_seconds + once_seconds) / 60, one GPU, 128 x 2048 tokens; extrapolated from few blocks"
        claims.append(claim("speed.calibration8b_minutes", minutes, "<=", 10, how))
        if (2, "block_seconds") in found:
            value = found[1, "block_seconds"] / found[2, "block_seconds"]
            how = "block_seconds of one GPU / those of two"
            claims.append(claim("speed.calibration_two_gpus", value, ">=", 1.7, how))
    return claims


def claims(rows: list[dict]) -> list[dict]:
    """All claims that the rows allow."""
    return linear_claims(rows) + model_claims(rows) + calibration_claims(rows)
