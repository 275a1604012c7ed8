"""The audit trail read from its beginning: what requests, rounds and the current state must be by now.

Written against the entries alone, apart from the code that writes them, so that each checks the other.
"""

from typing import Any

from distributed_unlearn.service.states import FINAL_STATES, Reason, RequestState, permitted


class ReplayError(Exception):
    """An entry that cannot follow the entries before it."""


def _require(condition: bool, sentence: str) -> None:
    if not condition:
        raise ReplayError(sentence)


class Replay:
    """What the entries so far have led to."""

    def __init__(self) -> None:
        self.requests: dict[int, dict[str, Any]] = {}
        self.names: dict[int, str] = {}
        self.rounds: dict[int, dict[str, Any]] = {}
        self.certificates: dict[int, str] = {}
        self.current_round: int | None = None
        self._token = 0
        self._tick = ""
        self._open: int | None = None

    def apply(self, event: str, body: dict[str, Any]) -> None:
        """Take one entry in.

        Raises:
            ReplayError: it cannot follow; KeyError: it lacks a part.
        """
        known = {
            "ledger_created": self._ignore,
            "lease_acquired": self._lease_acquired,
            "request_received": self._request_received,
            "request_moved": self._request_moved,
            "request_overdue": self._ignore,
            "tick_taken": self._tick_taken,
            "round_started": self._round_started,
            "round_resumed": self._round_resumed,
            "round_committed": self._round_committed,
            "round_rolled_back": self._round_rolled_back,
            "certificate_issued": self._certificate_issued,
            "ids_purged": self._ids_purged,
            "state_purged": self._state_purged,
        }
        _require(event in known, "no event of this name is known")
        known[event](body)

    def _ignore(self, body: dict[str, Any]) -> None:
        del body

    def _lease_acquired(self, body: dict[str, Any]) -> None:
        _require(body["token"] == self._token + 1, f"lease {body['token']} after lease {self._token}")
        self._token = body["token"]

    def _tick_taken(self, body: dict[str, Any]) -> None:
        _require(body["tick"] > self._tick, f"tick {body['tick']} after {self._tick}")
        self._tick = body["tick"]

    def _request_received(self, body: dict[str, Any]) -> None:
        number = body["request"]
        _require(number == len(self.requests) + 1, f"request {number} after request {len(self.requests)}")
        kept = {key: value for key, value in body.items() if key not in ("request", "names_sha256")}
        self.requests[number] = {**kept, "state": RequestState.RECEIVED.value, "reason": None, "round_id": None}
        self.names[number] = body["names_sha256"]

    def _request_moved(self, body: dict[str, Any]) -> None:
        request = self.requests[body["request"]]
        source, target = RequestState(body["from"]), RequestState(body["to"])
        _require(request["state"] == source, f"request {body['request']} is {request['state']}, not {source.value}")
        _require(permitted(source, target, Reason(body["reason"])), f"no transition from {source} to {target}")
        if target == RequestState.IN_ROUND:
            _require(body["round"] == self._open, "a round that is not open")
        request.update(state=target.value, reason=body["reason"], round_id=body["round"])

    def _round_started(self, body: dict[str, Any]) -> None:
        number = body["round"]
        _require(self._open is None, f"round {self._open} is open")
        _require(number == len(self.rounds) + 1, f"round {number} after round {len(self.rounds)}")
        _require(body["parent"] == self.current_round, f"its parent is not round {self.current_round}")
        _require(body["token"] == self._token, f"under lease {body['token']}, while {self._token} was held")
        self.rounds[number] = {
            "state": "started",
            "parent": body["parent"],
            "token": body["token"],
            "folder": None,
            "record_sha256": None,
            "files_sha256": None,
            "records_sha256": None,
        }
        self._open = number

    def _round_resumed(self, body: dict[str, Any]) -> None:
        _require(body["round"] == self._open, f"round {body['round']} is not open")
        _require(body["token"] == self._token, f"under lease {body['token']}, while {self._token} was held")

    def _end(self, number: int, state: str) -> dict[str, Any]:
        _require(number == self._open, f"round {number} is not open")
        self._open = None
        self.rounds[number]["state"] = state
        return self.rounds[number]

    def _round_committed(self, body: dict[str, Any]) -> None:
        entry = self._end(body["round"], "committed")
        entry.update({key: body[key] for key in ("folder", "record_sha256", "files_sha256", "records_sha256")})
        self.current_round = body["round"]

    def _round_rolled_back(self, body: dict[str, Any]) -> None:
        self._end(body["round"], "rolled_back")

    def _certificate_issued(self, body: dict[str, Any]) -> None:
        state = RequestState(self.requests[body["request"]]["state"])
        _require(state in FINAL_STATES, f"request {body['request']} is {state.value}")
        self.certificates[body["request"]] = body["sha256"]

    def _ids_purged(self, body: dict[str, Any]) -> None:
        for number in body["requests"]:
            state = RequestState(self.requests[number]["state"])
            _require(state in FINAL_STATES, f"request {number} is {state.value}")

    def _state_purged(self, body: dict[str, Any]) -> None:
        number = body["round"]
        _require(number != self.current_round, "the current state")
        self.rounds[number]["folder"] = None
