"""Numbers that JSON has no word for, as transformers spells them in config.json: {"__float__": "Infinity"}.

transformers reads the spelling where it reads the file, not in `from_dict`: whoever hands it a parsed config calls
`with_numbers` first, or its validators refuse configs that it wrote itself (Bamba's and Mamba-2's time_step_limit).
"""

SPELLINGS = ("Infinity", "-Infinity", "NaN")


def with_numbers(value: object) -> object:
    """A parsed JSON value with each {"__float__": …} as the number that it stands for; other words stay as they are."""
    if isinstance(value, dict):
        if value.keys() == {"__float__"} and value["__float__"] in SPELLINGS:
            return float(value["__float__"])
        return {key: with_numbers(part) for key, part in value.items()}
    return [with_numbers(part) for part in value] if isinstance(value, list) else value
