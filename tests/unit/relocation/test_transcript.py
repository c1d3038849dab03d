"""How far a migration is, from what both of its ends write into one pipe.

The messages are those of tools/xl/xl_migrate.c and tools/xl/xl_saverestore.c.
"""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pgofflined.relocation.transcript import Stage, Transcript

SAVING = "Saving to migration stream new xl format (info 0x3/0x0/1234)\n"
ACKNOWLEDGED = "migration sender: Target has acknowledged transfer.\n"
PERMISSION = "migration sender: Giving target permission to start.\n"
FINAL = "** Migration failed during final handshake **\nDomain state is now undefined !\n"
TRYING = "migration sender: Trying to resume at our end.\n"
RESUMED = "migration sender: Resumed OK.\n"
GAVE_UP = "Migration failed, resuming at sender.\n"

# What the other end, ssh or libxl's progress may have left standing there without an end.
UNFINISHED = [
    "",
    "migration target: Ready to receive domain.",
    "migration target: Transfer complete, requ",
    "\rxc: info: Saving domain 7, type x86 HVM: 1234/5678   21%",
    "Warning: Permanently added 'spare' to the list of known hosts.",
    "\x1b[2J\x00\xff",
]


def read(*pieces: str) -> Transcript:
    transcript = Transcript()
    for piece in pieces:
        transcript.feed(piece.encode("latin-1"))
    return transcript


@pytest.mark.parametrize("before", UNFINISHED)
@pytest.mark.parametrize("after", UNFINISHED)
@pytest.mark.parametrize(
    ("message", "stage"),
    [
        (SAVING, Stage.SAVING),
        (ACKNOWLEDGED, Stage.HANDSHAKE),
        (PERMISSION, Stage.GIVEN),
        (FINAL, Stage.GIVEN),
    ],
)
def test_a_message_is_seen_beside_unfinished_lines_of_the_other_end(
    before: str, after: str, message: str, stage: Stage
) -> None:
    if "Transfer complete" in before + after:
        stage = max(stage, Stage.HANDSHAKE)
    assert read(before + message + after).stage is stage
    # Its own line may not be finished, either.
    assert read(before + message.rstrip("\n") + after).stage is stage


@given(
    before=st.binary(max_size=200),
    after=st.binary(max_size=200),
    cuts=st.lists(st.integers(min_value=0, max_value=500), max_size=8),
)
def test_permission_is_never_missed_however_the_stream_is_cut(
    before: bytes, after: bytes, cuts: list[int]
) -> None:
    stream = before + PERMISSION.rstrip().encode() + after
    transcript = Transcript()
    at = 0
    for cut in [*sorted(cuts), len(stream)]:
        transcript.feed(stream[at : max(at, cut)])
        at = max(at, cut)
    assert transcript.stage is Stage.GIVEN
    assert transcript.is_in_doubt


def test_permission_is_seen_when_it_comes_byte_by_byte() -> None:
    assert read(*(UNFINISHED[1] + PERMISSION)).stage is Stage.GIVEN


def test_permission_is_seen_after_much_without_the_end_of_a_line() -> None:
    assert read("x" * 100_000, "y" * 100_000 + PERMISSION).stage is Stage.GIVEN


@pytest.mark.parametrize(
    "message",
    [
        "migration target: Got permission, starting domain.\n",
        "migration target: Domain started successsfully.\n",
        "migration target: Failure, destroying our copy.\n",
        "migration target: Cleanup OK, granting sender permission to resume.\n",
        "migration sender: Target reports startup failure (status code 3).\n",
        "migration sender: Target reports successful startup.\n",
        TRYING,
        "** Migration failed during final handshake **\n",
        "Domain state is now undefined !\n",
        "DOMAIN STATE IS NOW UNDEFINED\n",
        "Please CHECK AT BOTH ENDS for running instances, before renaming and\n",
        "Migration failed due to problems at target.\n",
    ],
)
def test_whatever_comes_after_the_permission_stands_for_it(message: str) -> None:
    transcript = read(SAVING, ACKNOWLEDGED, message)
    assert transcript.stage is Stage.GIVEN
    assert transcript.may_run_there
    assert transcript.is_in_doubt


@pytest.mark.parametrize(
    "said",
    [
        "",
        "No config file stored for running domain and none supplied - cannot migrate.\n",
        "migration target: Ready to receive domain.\n",
        SAVING + "libxl: error: libxl_dom_save.c:123: no assigned devices\n",
        SAVING + "migration sender: libxl_domain_suspend failed (rc=-3)\n" + GAVE_UP,
        SAVING + "Migration failed, failed to suspend at sender.\n",
    ],
)
def test_what_fails_before_the_handshake_is_not_in_doubt(said: str) -> None:
    transcript = read(said)
    assert not transcript.may_run_there
    assert not transcript.is_in_doubt


def test_once_the_transfer_is_acknowledged_an_end_without_a_word_is_in_doubt() -> None:
    # Permission is the next thing that xl gives.
    assert read(SAVING, ACKNOWLEDGED).is_in_doubt
    assert read(SAVING, "migration target: Transfer complete, requesting").is_in_doubt
    # Unless it says that it could not rename the guest.
    transcript = read(SAVING, ACKNOWLEDGED, GAVE_UP)
    assert not transcript.is_in_doubt
    assert transcript.may_run_there


def test_a_guest_that_xl_says_it_has_resumed_may_still_run_there_as_far_as_is_known_for_sure() -> (
    None
):
    transcript = read(SAVING, ACKNOWLEDGED, PERMISSION, TRYING, RESUMED)
    assert not transcript.is_in_doubt
    # A name could have said so: only who sees the guest run may believe it.
    assert transcript.may_run_there


@pytest.mark.parametrize(
    "pieces",
    [
        # Before it can be true.
        [SAVING, RESUMED, ACKNOWLEDGED, PERMISSION],
        [SAVING, TRYING, RESUMED, ACKNOWLEDGED, PERMISSION],
        [SAVING, GAVE_UP, ACKNOWLEDGED, PERMISSION],
        [SAVING + TRYING + RESUMED + ACKNOWLEDGED + PERMISSION],
        # Without the word that goes before it.
        [SAVING, ACKNOWLEDGED, PERMISSION, RESUMED],
        [SAVING, ACKNOWLEDGED, TRYING, RESUMED],
        # Not as a line of its own.
        [SAVING, ACKNOWLEDGED, PERMISSION, TRYING, "the guest " + RESUMED],
        [SAVING, ACKNOWLEDGED, PERMISSION, TRYING, RESUMED.rstrip() + " she said\n"],
        [SAVING, ACKNOWLEDGED, PERMISSION, TRYING, RESUMED.rstrip()],
        [SAVING, ACKNOWLEDGED, PERMISSION, TRYING, "z" * 9000 + RESUMED],
        [SAVING, ACKNOWLEDGED, PERMISSION, "a" + TRYING, RESUMED],
        # xl itself says otherwise.
        [SAVING, ACKNOWLEDGED, PERMISSION, TRYING, RESUMED, FINAL],
        [SAVING, ACKNOWLEDGED, PERMISSION, FINAL, TRYING, RESUMED],
        [SAVING, ACKNOWLEDGED, GAVE_UP, FINAL],
    ],
)
def test_resumed_is_believed_only_where_xl_says_it(pieces: list[str]) -> None:
    assert read(*pieces).is_in_doubt


def test_the_stage_never_goes_back() -> None:
    assert read(SAVING, ACKNOWLEDGED, PERMISSION, SAVING, ACKNOWLEDGED).stage is Stage.GIVEN


def test_its_last_words_are_a_few_lines_and_move_no_terminal() -> None:
    said = read("first\nsecond\rthird\n\n", "\x1b[2Jfourth\x07\nfifth, unfin", "ished").last_words(
        3
    )
    assert said == "third; \\x1b[2Jfourth\\x07; fifth, unfinished"
    assert read("").last_words() == "nothing"
