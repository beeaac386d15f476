"""Ten records in the schema of each benchmark, all of them made up by hand: none is of the benchmark itself."""

from __future__ import annotations

from typing import Any

TOWNS = ("Abel", "Brun", "Cole", "Dorn", "Esk", "Fenn", "Garth", "Holm", "Ise", "Jarl")


def wikibigedit() -> list[dict[str, Any]]:
    """By its card: a multi-hop question and a persona for some records only."""
    return [
        {
            "tag": "update",
            "subject": town,
            "update": f"Who is the mayor of {town}?",
            "rephrase": f"Who governs {town} as its mayor?",
            "personas": f"Ahoy, who be steerin' {town}?",
            "ans": f"{town}son",
            "loc": "Who is the mayor of Upper Ness?",
            "loc_ans": "Nessa",
            "mhop": f"Where was the mayor of {town} born?" if i % 2 else None,
            "mhop_ans": "Lower Ness" if i % 2 else None,
        }
        for i, town in enumerate(TOWNS)
    ]


def ultraeditbench() -> list[dict[str, Any]]:
    """By the readers of it that are published."""
    return [
        {
            "prompt": f"What is the river of {town}?",
            "subject": town,
            "rephrase_prompt": f"Which river flows through {town}?",
            "ans": f"{town} Water",
            "loc": "What is the river of Upper Ness?",
            "loc_ans": "the Ness",
        }
        for town in TOWNS
    ]


def unke() -> list[dict[str, Any]]:
    """Long answers, and questions about their parts."""
    return [
        {
            "id": i,
            "question": f"What is {town} known for?",
            "para_question": f"Why do people know {town}?",
            "answer": f"{town} is known for its mill. It was built in 17{i}0, and burned twice.",
            "sub_question": [f"What is {town} known for?", f"When was the mill of {town} built?"],
            "sub_answer": ["Its mill.", f"17{i}0."],
        }
        for i, town in enumerate(TOWNS)
    ]


def rewrite(subject: str, relation: str, new: str, old: str) -> dict[str, Any]:
    return {
        "prompt": f"The {relation} of {{}} is",
        "relation_id": "P0",
        "target_new": {"str": new, "id": "Q1"},
        "target_true": {"str": old, "id": "Q2"},
        "subject": subject,
        "question": f"What is the {relation} of {subject}?",
    }


def mquake() -> list[dict[str, Any]]:
    """Cases of one edit and of two in turn, each with three questions that all its edits answer."""
    return [
        {
            "case_id": i,
            "requested_rewrite": [
                rewrite(town, "country", f"{town}land", "Ness"),
                *([rewrite(f"{town}land", "capital", f"{town}burg", "Nessburg")] if i % 2 else []),
            ],
            "questions": [f"What is the capital of the {word} of {town}?" for word in ("country", "nation", "state")],
            "answer": "Nessburg",
            "answer_alias": [],
            "new_answer": f"{town}burg",
            "new_answer_alias": [f"City of {town}burg"],
            "single_hops": [],
            "new_single_hops": [],
        }
        for i, town in enumerate(TOWNS)
    ]


def akew() -> list[dict[str, Any]]:
    """CounterFact's cases with a text as their answer, and the facts in it."""
    return [
        {
            "case_id": i,
            "requested_rewrite": {
                **rewrite(town, "country", f"{town}land", "Ness"),
                "prompt_full": f"Which country is {town} in?",
                "fact_new_uns": f"{town} lies in {town}land. It has {i + 2} gates.",
                "unsfact_triplets_GPT": [
                    {"subject": town, "prompt": "The number of gates of {} is", "target": str(i + 2)}
                ],
            },
            "paraphrase_prompts": [f"{town} is a town in"],
            "neighborhood_prompts": ["The country of Upper Ness is"],
        }
        for i, town in enumerate(TOWNS)
    ]


BENCHMARKS = {
    "WikiBigEdit": wikibigedit,
    "UltraEditBench": ultraeditbench,
    "UnKE": unke,
    "MQuAKE": mquake,
    "AKEW": akew,
}
