"""Records for choosing settings of a hundred edits in a row, none of which is of a test split.

    python benchmarks/validation.py

writes ``tuning/validation.json``: the shipped records' own validation split, and one fact of each subject of
WikiData_recent (KnowEdit) that the shipped model was taught, with another answer of the same relation as target and
another taught phrasing as rephrasing.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from kdpo_editor.compare.run.datasets import in_validation, load
from kdpo_editor.testbed import HERE, load_records

OUT = Path(__file__).parent / "tuning" / "validation.json"


def records() -> list[dict[str, Any]]:
    """In the schema of the shipped records."""
    kept = {r.subject for r in load("shipped") if in_validation(r)}
    found = [record for record in load_records() if record["subject"] in kept]
    rng = random.Random(7)
    facts = json.loads((HERE / "facts.json").read_text("utf-8"))
    answers: dict[str, set[str]] = {}
    for fact in facts:
        answers.setdefault(fact["relation"], set()).add(fact["answer"])
    recent = [fact for fact in facts if fact["source"] == "recent"]
    seen: set[str] = set()
    for fact in recent:
        others = sorted(answers[fact["relation"]] - {fact["answer"]})
        rest = [f for f in recent if f["subject"] == fact["subject"] and f is not fact]
        if fact["subject"] in seen or len(others) < 3 or len(fact["trained"]) < 3 or not rest:
            continue
        seen.add(fact["subject"])
        prompt, rephrase = rng.sample(fact["trained"], 2)
        other = rng.choice(rest)
        found.append(
            {
                "subject": fact["subject"],
                "relation": fact["relation"],
                "prompt": prompt,
                "rephrase_prompt": rephrase,
                "target_new": rng.choice(others),
                "ground_truth": fact["answer"],
                "locality": [{"prompt": rng.choice(other["trained"]), "ground_truth": other["answer"]}],
                "locality_relation": other["relation"],
            }
        )
    return found


if __name__ == "__main__":
    OUT.write_text(json.dumps(records(), indent=1, ensure_ascii=False) + "\n", "utf-8")
