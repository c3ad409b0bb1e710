"""What sampled sequences begin with and how their conversations go on: prompts, chat turns, seeded first words."""

from __future__ import annotations

import logging
import random
from collections import deque
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

from jinja2 import TemplateError

logger = logging.getLogger(__name__)

# Short, of many kinds and a few languages: they set the topic, the model's own answer is the data.
PROMPTS = (
    "What is the capital of Australia, and why was it chosen?",
    "Explain how a refrigerator works.",
    "Write a short poem about rain in a city.",
    "Give me a recipe for a simple vegetable soup.",
    "What is 17 times 24? Show your steps.",
    "Write a Python function that reverses a linked list.",
    "Summarize the causes of the First World War.",
    "Translate into French: Where is the nearest train station?",
    "How do vaccines work?",
    "Tell me a story about a lighthouse keeper.",
    "What are the differences between TCP and UDP?",
    "List ten ideas for a birthday present for my sister.",
    "I feel nervous before exams. What can I do?",
    "Correct this sentence: She don't likes apples.",
    "Who wrote Don Quixote, and what is it about?",
    "Explain photosynthesis to a child of eight.",
    "Write an e-mail to my landlord about a broken heater.",
    "What does the SQL statement GROUP BY do? Give an example.",
    "Compare cats and dogs as pets.",
    "How can I save money on groceries?",
    "Solve for x: 3x + 7 = 22.",
    "Plan a weekend trip to Lisbon.",
    "What is inflation?",
    "Write a product description for a wooden desk lamp.",
    "Name five birds that cannot fly.",
    "What is the difference between weather and climate?",
    "Convert 5 miles to kilometres.",
    "Write a bash script that renames all .jpeg files to .jpg.",
    "Why is the sky blue?",
    "Give me arguments for and against remote work.",
    "Rewrite this more politely: Send me the report now.",
    "What happens in the human body when we sleep?",
    "Explain recursion with an example in JavaScript.",
    "Describe the rules of chess in a few paragraphs.",
    "Was ist der Unterschied zwischen Gleichstrom und Wechselstrom?",
    "¿Qué puedo cocinar con arroz, huevos y tomates?",
    "Explique-moi la photosynthèse en quelques phrases.",
    "用简单的话解释什么是黑洞。",
    "東京でおすすめの観光地を教えてください。",
    "Расскажи коротко об истории Санкт-Петербурга.",
    "ما هي فوائد القراءة؟",
    "Classify the sentiment of this review: The plot was dull, but the music saved the film.",
    "Extract the dates from: The meeting moved from 3 May to 12 June 2021.",
    "Return a JSON object with the name, age and city of a made-up person.",
    "What should I consider when buying a used car?",
    "Write a dialogue between a doctor and a patient.",
    "How many prime numbers are there below 50?",
    "Give three facts about the ocean that surprise most people.",
)
_USER_TOKENS = 96  # a sampled user turn that has not ended by then is ended
_MARKS = ("hfq-first-mark", "hfq-second-mark", "hfq-third-mark")


@dataclass(frozen=True)
class Chat:
    """The token pieces of a chat template.

    Attributes:
        opening: before the first user message.
        to_assistant: between a user message and the answer.
        to_user: between an answer and the next user message.
        ends: tokens that end a turn.
    """

    opening: str
    to_assistant: str
    to_user: str
    ends: frozenset[int]


@dataclass
class Script:
    """One sequence as it is sampled: tokens that are due, and what the next turn is.

    Attributes:
        due: tokens to be put next instead of sampled ones; at the start it holds at least one.
        ends: tokens that end a turn or a text.
        answer_bridge: tokens from a user message to the answer (a chat whose user is sampled), or None.
        user_bridge: tokens from an answer to the next user message, or None for a plain text.
        questions: the user messages of a chat with given ones, each with its bridge to the answer.
        after_end: tokens after the end of a plain text (a BOS, for models that have one before every text).
        user_left: tokens left of the sampled user turn, or None during an answer or a plain text.
    """

    due: deque[int]
    ends: frozenset[int]
    answer_bridge: list[int] | None = None
    user_bridge: list[int] | None = None
    questions: deque[list[int]] = field(default_factory=deque)
    after_end: list[int] = field(default_factory=list)
    user_left: int | None = None

    def put(self, sampled: int) -> int:
        """The token that comes next, given the one that the model would take."""
        if self.due:
            return self.due.popleft()
        if self.user_left is not None and self.answer_bridge:
            self.user_left -= 1
            if self.user_left <= 0 or sampled in self.ends or sampled == self.answer_bridge[0]:
                self.user_left = None
                return self._play(self.answer_bridge)
        elif sampled in self.ends:
            if self.user_bridge is None:
                self.due.extend(self.after_end)
                return sampled
            if self.questions:
                question = self.questions.popleft()
                self.questions.append(question)
                return self._play([*self.user_bridge, *question])
            if self.answer_bridge is not None:
                self.user_left = _USER_TOKENS
            return self._play(self.user_bridge)
        return sampled

    def _play(self, tokens: Sequence[int]) -> int:
        self.due.extend(tokens)
        return self.due.popleft()


def read_chat(tokenizer: Any, ends: Collection[int]) -> Chat | None:
    """The pieces of a chat template; None when there is none, or (said in the log) when it does not come apart."""
    if not getattr(tokenizer, "chat_template", None):
        return None
    roles = ("user", "assistant", "user")
    messages = [{"role": role, "content": mark} for role, mark in zip(roles, _MARKS, strict=True)]
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except (TemplateError, TypeError, ValueError) as error:
        logger.warning("the chat template cannot be used for sampled calibration data: %s", error)
        return None
    places = [text.find(mark) for mark in _MARKS]
    if places != sorted(places) or places[0] < 0 or any(text.count(mark) != 1 for mark in _MARKS):
        logger.warning("the chat template changes its messages: calibration data is sampled without it.")
        return None
    after = [place + len(mark) for place, mark in zip(places, _MARKS, strict=True)]
    chat = Chat(text[: places[0]], text[after[2] :], text[after[1] : places[2]], frozenset(ends))
    if not chat.to_user or not chat.to_assistant:
        logger.warning("the chat template puts nothing between messages: calibration data is sampled without it.")
        return None
    return chat


def write_scripts(
    tokenizer: Any, chat: Chat | None, count: int, seed: int, ends: frozenset[int], bos: int | None, vocabulary: int
) -> list[Script]:
    """Scripts for ``count`` sequences: with a chat template, every second one is a conversation.

    Plain texts begin with a seeded first word (after the BOS, where the tokenizer puts one; every second of those with
    the BOS alone). Conversations take turns between given user messages and messages that the model samples too.
    """
    generator = random.Random(seed)
    scripts = []
    for index in range(count):
        turn = index // 2 if chat is not None else index
        if chat is not None and index % 2:
            scripts.append(_conversation(tokenizer, chat, turn % 2 == 1, generator))
            continue
        start = [] if bos is None else [bos]
        if bos is None or turn % 2:
            start.append(_first_word(tokenizer, generator, vocabulary))
        scripts.append(Script(deque(start), ends, after_end=[] if bos is None else [bos]))
    return scripts


def _conversation(tokenizer: Any, chat: Chat, sampled_user: bool, generator: random.Random) -> Script:
    bridge = _encode(tokenizer, chat.to_user)
    if sampled_user:
        answer = _encode(tokenizer, chat.to_assistant)
        opening = _encode(tokenizer, chat.opening)
        if opening and answer and bridge:
            return Script(deque(opening), chat.ends, answer, bridge, user_left=_USER_TOKENS)
    prompts = generator.sample(PROMPTS, 8)
    questions = deque(_encode(tokenizer, prompt + chat.to_assistant) for prompt in prompts[1:])
    return Script(
        deque(_encode(tokenizer, chat.opening + prompts[0] + chat.to_assistant)), chat.ends, None, bridge, questions
    )


def _encode(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _first_word(tokenizer: Any, generator: random.Random, vocabulary: int) -> int:
    """A token that is a word or a piece of one; the frequent ones (low in most vocabularies) are likelier."""
    special = {*tokenizer.all_special_ids, *getattr(tokenizer, "added_tokens_decoder", {})}
    size = min(vocabulary, len(tokenizer))
    pick = 0
    for _ in range(200):
        pick = int(size * generator.random() ** 2)
        word = "" if pick in special else tokenizer.decode([pick]).strip()
        if word.isalpha() and (len(word) > 1 or not word.isascii()):
            return pick
    return next((token for token in range(pick, pick + size) if token % size not in special), pick) % size
