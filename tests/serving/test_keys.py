"""Keys: only their SHA-256 is kept, and a key ends when it is revoked, expired or rotated."""

import math
import multiprocessing
import random
import re
import threading
import time
from pathlib import Path

import pytest

from onecard.config.serving import SCOPES
from onecard.errors import UserError
from onecard.serving import keys as serving_keys
from onecard.serving import store as serving_store
from onecard.serving.keys import Key, Keys, Refusal

SPAWN = multiprocessing.get_context("spawn")
DAY = 86400


class Clock:
    """Seconds since 1970 that a test moves."""

    def __init__(self) -> None:
        self.seconds = 1_800_000_000.5

    def __call__(self) -> float:
        return self.seconds


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def keys(tmp_path, clock):
    with serving_store.opened(tmp_path / "data", now=clock) as store:
        yield store.keys


def test_a_key_is_found_with_what_it_may(keys, clock):
    made, secret = keys.create("alice", ["chat", "jobs"], "team", 30 * DAY, 5)
    assert keys.find(secret) == made
    expires = int(clock.seconds) + 30 * DAY
    assert made == Key(made.id, "alice", "team", frozenset({"chat", "jobs"}), 5, expires)
    assert secret not in repr(made)
    (entry,) = keys.entries()
    assert (entry.key, entry.prefix, entry.revoked) == (made, secret[:8], None)


def test_other_texts_are_unknown(keys):
    """A1: almost the same, longer, empty, the digest itself, and texts that no header can hold."""
    _, secret = keys.create("alice", ["chat"])
    digest = serving_keys.digest_of(secret)
    wrong = [secret[:-1], secret + "A", secret.upper(), secret + "\0", "", digest, secret[:8], " " + secret]
    wrong += ["oc-" + "A" * 10_000, "\ud800", "ключ", "' OR 1=1 --", secret + "A" * 1000]
    assert {keys.find(text) for text in wrong} == {Refusal.UNKNOWN}


def test_a_key_is_random(keys):
    """A2: at least 128 bits; here 43 characters with 6 bits each, all of them used."""
    secrets = [keys.create(f"user {number}", ["chat"])[1] for number in range(50)]
    assert all(re.fullmatch(r"oc-[\w-]{43}", secret) for secret in secrets)
    hidden = [secret[serving_keys.SHOWN :] for secret in secrets]
    assert len(hidden[0]) * 6 >= 128
    assert len(set(hidden)) == 50
    letters = "".join(hidden)
    counts = [letters.count(letter) for letter in set(letters)]
    entropy = -sum(count / len(letters) * math.log2(count / len(letters)) for count in counts)
    assert entropy > 5.9, "bits per character"


def test_an_expired_key_is_refused(keys, clock):
    _, secret = keys.create("alice", ["chat"], seconds=60)
    clock.seconds += 59
    assert isinstance(keys.find(secret), Key)
    clock.seconds += 1
    assert keys.find(secret) is Refusal.EXPIRED


def test_a_revoked_key_is_refused_and_frees_its_name(keys):
    first, secret = keys.create("alice", ["chat"])
    with pytest.raises(UserError, match="valid key with the name 'alice' already"):
        keys.create("alice", ["chat"])
    assert keys.revoke("alice") == first
    assert keys.find(secret) is Refusal.REVOKED
    with pytest.raises(UserError, match="no valid key"):
        keys.revoke("alice")
    again, _ = keys.create("alice", ["jobs"])
    assert keys.revoke(again.id) == again
    assert [entry.revoked is not None for entry in keys.entries()] == [True, True]


def test_rotation_replaces_the_text_alone(keys, clock):
    made, old = keys.create("alice", ["chat"], "team", 60, 5)
    rotated, new = keys.rotate("alice")
    assert keys.find(old) is Refusal.UNKNOWN
    assert keys.find(new) == rotated == made
    longer, newest = keys.rotate(made.id, seconds=120)
    assert longer.expires == int(clock.seconds) + 120
    assert keys.find(newest) == longer


def test_an_owner_reaches_only_its_own_keys(keys):
    """A4, the cell of keys: those of others are as good as missing."""
    mine, _ = keys.create("mine", ["chat"], "alice")
    other, secret = keys.create("other", ["chat"], "bob")
    assert [entry.key for entry in keys.entries("alice")] == [mine]
    for name in ("other", other.id):
        with pytest.raises(UserError, match="no valid key"):
            keys.revoke(name, owner="alice")
        with pytest.raises(UserError, match="no valid key"):
            keys.rotate(name, owner="alice")
    assert keys.find(secret) == other


@pytest.mark.parametrize(
    "name",
    ["", " ", "a\nb", "\x1b[31mred", "a\r\nSet-Cookie: b", "a\0", "x" * 65, "\u202egpj", " a", "\ud800"],
)
def test_names_that_could_forge_a_line_are_refused(keys, name):
    """A14: line ends, terminal sequences, hidden and reversing characters; the message is one plain line."""
    for arguments in ((name, ["chat"]), ("fine", ["chat"], name or "\n")):
        with pytest.raises(UserError) as error:
            keys.create(*arguments)
        assert str(error.value).isprintable()
        assert str(error.value).isascii()
    assert keys.entries() == []


@pytest.mark.parametrize("name", ["Robert'); DROP TABLE keys;--", '" OR ""="', "%_\\", "名字", "a;b|c $(d)"])
def test_names_are_literal(keys, name):
    """A14: SQL and shell texts are kept as they are, and match nothing but themselves."""
    _, other = keys.create("other", ["chat"])
    made, secret = keys.create(name, ["chat"])
    assert keys.find(secret) == made
    assert made.name == made.owner == name
    assert keys.revoke(name) == made
    assert isinstance(keys.find(other), Key)


# first start


def ask_for_the_first_key(folder: Path, barrier, answers) -> None:
    with serving_store.opened(folder) as store:
        barrier.wait(60)
        answers.put(store.keys.first_admin_key())


def test_two_first_starts_make_one_key(tmp_path):
    """A22: one random key with all scopes, although two processes ask at the same moment."""
    barrier, answers = SPAWN.Barrier(2), SPAWN.Queue()
    arguments = (tmp_path / "data", barrier, answers)
    children = [SPAWN.Process(target=ask_for_the_first_key, args=arguments) for _ in range(2)]
    for child in children:
        child.start()
    results = [answers.get(timeout=60) for _ in children]
    for child in children:
        child.join()
    (made,) = [result for result in results if result]
    assert made[0].scopes == set(SCOPES)
    assert len(made[1]) == 46
    with serving_store.opened(tmp_path / "data") as store:
        assert store.keys.find(made[1]) == made[0]
        assert store.keys.first_admin_key() is None


def test_the_first_key_is_made_once(keys):
    """A22: revoking it makes no other one; keys without the scope admin do not replace it."""
    keys.create("admin", ["chat"])
    made, _ = keys.first_admin_key()
    assert made.name == "admin-1"
    keys.revoke(made.id)
    assert keys.first_admin_key() is None


def test_no_key_is_built_in(keys):
    """A22: nothing is valid before a key was made."""
    assert keys.entries() == []
    for text in ("", "admin", "oc-admin", "password", "sk-"):
        assert keys.find(text) is Refusal.UNKNOWN


# several processes


def revoke_after(folder: Path, begins, moments) -> None:
    with serving_store.opened(folder) as store:
        begins.wait(60)
        store.keys.revoke("alice")
        moments.put(time.monotonic())


def test_a_revocation_by_another_process_ends_the_key(tmp_path):
    """Every look-up that begins after the other process has revoked the key is refused; none fails."""
    with serving_store.opened(tmp_path / "data") as store:
        made, secret = store.keys.create("alice", ["chat"])
        begins, moments = SPAWN.Event(), SPAWN.Queue()
        child = SPAWN.Process(target=revoke_after, args=(tmp_path / "data", begins, moments))
        child.start()
        results: list[tuple[float, Key | Refusal]] = []

        def look_up() -> None:
            while not (results and results[-1][1] is Refusal.REVOKED):
                results.append((time.monotonic(), store.keys.find(secret)))

        threads = [threading.Thread(target=look_up) for _ in range(3)]
        for thread in threads:
            thread.start()
        begins.set()
        moment = moments.get(timeout=60)
        for thread in [*threads, child]:
            thread.join(60)
    assert {found for _, found in results} == {made, Refusal.REVOKED}
    assert [found for began, found in results if began > moment and found is not Refusal.REVOKED] == []


def test_many_threads_share_the_database(keys):
    """More threads than connections: each gets its answer."""
    secrets = [keys.create(f"user {number}", ["chat"])[1] for number in range(4)]
    answers: list[Key | Refusal] = []

    def work(number: int) -> None:
        for _ in range(5):
            answers.append(keys.find(secrets[number % 4]))
        keys.revoke(f"user {number}") if number < 4 else keys.create(f"new {number}", ["chat"])

    threads = [threading.Thread(target=work, args=(number,)) for number in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(answers) == 100
    assert len(keys.entries()) == 20
    assert Refusal.UNKNOWN not in answers


@pytest.mark.slow
def test_a_known_beginning_takes_no_other_time(tmp_path):
    """A3: 20,000 look-ups of almost right keys and of random ones; the difference is below a tenth sigma."""
    with serving_store.opened(tmp_path / "data") as store:
        _, secret = store.keys.create("alice", ["chat"])
        times = timings(store.keys, secret, 20_000)
    print(f"effect size {effect(*times):.3f}, 95 % within {1.96 * math.sqrt(2 / 20_000):.3f}")
    assert abs(effect(*times)) < 0.1


def timings(keys: Keys, secret: str, count: int) -> tuple[list[float], list[float]]:
    """Seconds of look-ups with the beginning of a key, and of others, in random order."""
    texts = [secret[:-4], serving_keys.new_secret()[:-4]]
    times: tuple[list[float], list[float]] = ([], [])
    order = [0, 1] * count
    random.Random(0).shuffle(order)
    for number, kind in enumerate(order):
        text = texts[kind] + f"{number % 10_000:04}"
        began = time.perf_counter()
        keys.find(text)
        times[kind].append(time.perf_counter() - began)
    return times


def effect(first: list[float], second: list[float]) -> float:
    """The difference of two means in standard deviations, without the slowest twentieth of each."""
    kept = [sorted(each)[: len(each) * 19 // 20] for each in (first, second)]
    means = [sum(each) / len(each) for each in kept]
    squares = [sum((x - mean) ** 2 for x in each) / len(each) for each, mean in zip(kept, means, strict=True)]
    return (means[0] - means[1]) / math.sqrt(sum(squares) / 2)
