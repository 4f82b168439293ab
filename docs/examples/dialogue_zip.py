"""Dialogues of two speakers, one text file each in a zip, as rows with a special token at each end of a turn.

    DIALOGUES=dialogues.zip llmkit fetch data.script=dialogue_zip.py to=data/dialogues

A file of the zip reads like this; the model is to learn what B says:

    A: Is the shop open
    on Sundays?
    B: From ten to four.
"""

import os
import re
import zipfile

ROLES = {"A": "USER", "B": "ASSISTANT"}
TOKENS = [token for role in ROLES.values() for token in (f"<{role}>", f"</{role}>")]
SPLITS = ("train", "test")


def rows(split):
    if "DIALOGUES" not in os.environ:
        raise ValueError("the environment variable DIALOGUES has to name the zip, as in DIALOGUES=dialogues.zip")
    with zipfile.ZipFile(os.environ["DIALOGUES"]) as archive:
        names = sorted(name for name in archive.namelist() if name.endswith(".txt"))
        for number, name in enumerate(names):
            if (number % 10 == 0) == (split == "test"):  # every tenth file is kept for the test
                turns = read_turns(archive.read(name).decode("utf-8-sig"))
                if turns:
                    yield {"id": name, "input": "".join(f"<{role}>{words}</{role}>" for role, words in turns)}


def read_turns(text):
    """[(role, words)]: the first is the user's and the last the assistant's."""
    if any(token in text for token in TOKENS):
        raise ValueError("a dialogue has one of TOKENS in its text")
    turns = []
    for line in text.splitlines():
        said = re.match(r"([AB]):\s*(.*)", line)
        if said and not (turns and turns[-1][0] == ROLES[said[1]]):
            turns.append((ROLES[said[1]], said[2].strip()))
        elif turns and line.strip():  # the same speaker goes on
            role, words = turns[-1]
            turns[-1] = (role, f"{words} {said[2] if said else line.strip()}".strip())
    if turns and turns[0][0] == "ASSISTANT":
        del turns[0]  # nobody asked
    if turns and turns[-1][0] == "USER":
        del turns[-1]  # nobody answered
    return turns
