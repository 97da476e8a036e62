"""Print N chats as JSON lines: python make_chats.py N"""

import json
import random
import sys

WORDS = "pump valve relay ledger harbor violin glacier orchard turbine lantern quarry sonata".split()  # noqa: SIM905
generator = random.Random(1)


def sentence(num_words: int) -> str:
    return " ".join(generator.choice(WORDS) for _ in range(num_words)).capitalize() + "."


for number in range(int(sys.argv[1])):
    question = {"role": "user", "content": f"{number}: {sentence(4 + generator.randrange(12))}"}
    answer = {"role": "assistant", "content": sentence(3 + generator.randrange(25))}
    print(json.dumps({"messages": [question, answer]}))
