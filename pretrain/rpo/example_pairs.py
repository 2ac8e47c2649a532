"""Preference pairs out of the standard library: which first line of documentation belongs to a function?

The prompt is a function's head, the chosen completion its own first line of documentation, the rejected one another
function's. Small, real, and at hand in every installation: for trying things out, not for making a better model.
"""

from __future__ import annotations

import ast
import json
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from mixwright.data_mixing.permutation import mix_key, permute
from mixwright.data_mixing.staging import atomic_file

_EXAMPLE = 0x5250_4F07
MIN_CHARS = 20
"""Shorter first lines say too little to belong to a function."""


def write_example_pairs(path: Path, seed: int = 0) -> int:
    """Write the pairs as JSONL with prompt, chosen and rejected; returns their number. Raises DataError."""
    found = list(dict.fromkeys(_documented_functions(Path(sysconfig.get_paths()["stdlib"]))))
    order = permute(np.arange(len(found)), len(found), mix_key(_EXAMPLE, seed))
    rejected = {int(order[i]): found[int(order[i - 1])][1] for i in range(len(order))}
    num_pairs = 0
    with atomic_file(path) as file:
        for index, (prompt, chosen) in enumerate(found):
            if rejected[index] != chosen:
                record = {"prompt": prompt, "chosen": chosen, "rejected": rejected[index]}
                file.write(json.dumps(record, ensure_ascii=False).encode() + b"\n")
                num_pairs += 1
    return num_pairs


def _documented_functions(folder: Path) -> Iterator[tuple[str, str]]:
    """Head and first line of documentation of the functions in the modules of a folder, in order."""
    for path in sorted(folder.glob("*.py")):
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError, OSError):
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef):
                first = (ast.get_docstring(node) or "").partition("\n")[0].strip()
                if len(first) >= MIN_CHARS:
                    yield f'def {node.name}({ast.unparse(node.args)}):\n    """', f'{first}"""'
