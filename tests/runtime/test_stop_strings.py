"""Stop strings are found wherever the pieces are cut, and nothing of one is shown before it is known."""

from hypothesis import given, settings
from hypothesis import strategies as st

from trtllm.runtime.stop_strings import StopHit, StopStringFinder

ALPHABET = st.text("ab", max_size=12)
STOPS = st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=3)


def feed(finder: StopStringFinder, pieces: list[str]) -> tuple[str, str | None]:
    shown = ""
    for piece in pieces:
        news = finder.feed(piece)
        if isinstance(news, StopHit):
            return shown + news.text, news.stop
        shown += news
    return shown + finder.flush(), None


def first_complete(text: str, stops: list[str]) -> tuple[str, str | None]:
    """The definition: the shortest beginning of the text that ends with a stop string."""
    for end in range(1, len(text) + 1):
        matching = [stop for stop in stops if text[:end].endswith(stop)]
        if matching:
            longest = max(matching, key=len)
            return text[: end - len(longest)], longest
    return text, None


@settings(max_examples=1000, deadline=None)
@given(st.lists(ALPHABET, max_size=6), STOPS)
def test_the_stop_string_that_is_complete_first_cuts_the_text(pieces: list[str], stops: list[str]) -> None:
    assert feed(StopStringFinder(stops), pieces) == first_complete("".join(pieces), stops)


@settings(max_examples=500, deadline=None)
@given(st.lists(ALPHABET, max_size=6), STOPS)
def test_what_is_shown_never_has_to_be_taken_back_and_nothing_is_held_without_need(
    pieces: list[str], stops: list[str]
) -> None:
    finder, text, shown = StopStringFinder(stops), "", ""
    for piece in pieces:
        text += piece
        news = finder.feed(piece)
        if isinstance(news, StopHit):
            return
        shown += news
        held = text[len(shown) :]
        assert text.startswith(shown)
        assert held == "" or any(stop.startswith(held) for stop in stops)


def test_a_stop_string_can_be_kept_in_the_text() -> None:
    finder = StopStringFinder(["END"], include_in_output=True)
    assert feed(finder, ["one E", "N", "D two"]) == ("one END", "END")
    assert feed(StopStringFinder(["END"]), ["one E", "N", "D two"]) == ("one ", "END")
    assert feed(StopStringFinder([""]), ["all"]) == ("all", None)
