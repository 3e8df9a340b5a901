"""Claims of the CPU benchmark: the worse of its models counts."""

from __future__ import annotations

from tools.result_files import claim


def claims(rows: list[dict]) -> list[dict]:
    """Decoding speed and weight memory against bfloat16."""
    rows = [row for row in rows if row.get("threads", 1) == 1]
    found = {(row["model"], row["provider"], row["metric"]): row["value"] for row in rows}
    models = sorted({row["model"] for row in rows})
    speed = min(found[name, "bf16", "decode_seconds"] / found[name, "freeact", "decode_seconds"] for name in models)
    memory = max(found[name, "freeact", "weight_bytes"] / found[name, "bf16", "weight_bytes"] for name in models)
    shown = ", ".join(models)
    return [
        claim("speed.cpu.decode", speed, ">=", 1.5, f"seconds a token, bf16 / freeact, the least of {shown}"),
        claim(
            "speed.cpu.memory_ratio", memory, "<=", 0.55, f"bytes of all weights, freeact / bf16, the most of {shown}"
        ),
    ]
