"""Sentences about the daemon's state that ask for a person."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

from pgofflined.core.book import Cause, Phase
from pgofflined.core.domains import DomainIdentity
from pgofflined.core.policy import Policy, effective
from pgofflined.core.status import Snapshot
from pgofflined.core.xenversion import XenVersion


def policy_digest(policy: Policy) -> str:
    """Twelve hexadecimal digits that change with the policy."""
    text = "\n".join(effective(policy))
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def attention(
    snapshot: Snapshot,
    *,
    stuck: Mapping[DomainIdentity, str],
    version: XenVersion,
    trouble: str | None,
    saves: tuple[str, ...] = (),
) -> tuple[str, ...]:
    """What needs a person, the worst first."""
    lines = [f"d{domain.domid} does not run because of us: {why}" for domain, why in stuck.items()]
    lines += saves
    damaged = [entry for entry in snapshot.pages if entry.reason == "damaged"]
    lines += [f"d{entry.domain.domid} lost mfn {entry.mfn:#x}" for entry in damaged if entry.domain]
    if snapshot.source.name is None:
        lines.append(snapshot.source.note)
    if not version.polls_corrected_errors_without_cmci:
        lines.append(
            f"Xen {version} polls no bank for corrected errors; without CMCI none is reported"
        )
    if snapshot.retired_frames >= snapshot.cap_frames:
        lines.append(
            f"{snapshot.retired_frames} pages are retired, which is all that retire.max_retired "
            "allows: replace the memory module"
        )
    left = [
        entry
        for entry in snapshot.pages
        if entry.phase is Phase.LEFT and entry.cause is Cause.CORRECTED
    ]
    if left:
        lines.append(f"{len(left)} failing pages stay in use; `pgofflined status` tells why")
    if not version.offlines_free_frames_safely:
        lines.append(
            f"Xen {version} cannot take free pages out safely; only pages of PV guests are retired"
        )
    if snapshot.idle_scrub:
        lines.append(
            f"{snapshot.idle_scrub} retired pages keep an idle CPU of their NUMA node busy until "
            "the host reboots"
        )
    if trouble is not None:
        lines.append(trouble)
    return tuple(lines)
