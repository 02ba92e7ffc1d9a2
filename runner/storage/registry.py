"""From a `Location` to the store that serves it. Adapters are imported when the first location of their kind appears."""

from __future__ import annotations

import dataclasses
import importlib
import threading
from collections import OrderedDict
from pathlib import Path
from typing import TYPE_CHECKING

from runner import errors
from runner.storage.files import FileStore

if TYPE_CHECKING:
    from runner import config
    from runner.storage.base import Location, ObjectStore
    from runner.storage.transport import Patience, Transport

_STORES = 256  # kept; the connections are shared by all and limited elsewhere
_ADAPTERS = {
    "s3": ("runner.storage.s3", "S3Store"),
    "http": ("runner.storage.http", "HttpStore"),
    "https": ("runner.storage.http", "HttpStore"),
}


class Stores:
    """The stores of this process, one for each place and set of credentials. Thread-safe."""

    def __init__(self, s3: config.S3, *, patience: Patience | None = None) -> None:
        self._s3 = s3
        self._patience = patience
        self._lock = threading.Lock()
        self._stores: OrderedDict[Location, ObjectStore] = OrderedDict()
        self._transports: dict[bool, Transport] = {}

    def store(self, location: Location) -> ObjectStore:
        """The store of `location`, whose key does not matter. May import an adapter (0.4 s, once): not for the loop.

        Raises `errors.UnsupportedRequest` for a place that no store can be at, `errors.UsageError` for unusable TLS files.
        """
        place = dataclasses.replace(location, key="")
        with self._lock:
            if place not in self._stores:
                self._stores[place] = self._made(place)
                if len(self._stores) > _STORES:
                    self._stores.popitem(last=False)
            self._stores.move_to_end(place)
            return self._stores[place]

    def close(self) -> None:
        """Close idle connections and forget the stores. Those still in use elsewhere go on working."""
        with self._lock:
            self._stores.clear()
            for transport in self._transports.values():
                transport.close()
            self._transports.clear()

    def _made(self, place: Location) -> ObjectStore:
        if place.scheme == "file":
            return FileStore(Path(place.bucket))
        if place.scheme not in _ADAPTERS:
            raise errors.UnsupportedRequest(f"there is no object store for {place.scheme}: addresses")
        module, name = _ADAPTERS[place.scheme]
        adapter = getattr(importlib.import_module(module), name)
        made: ObjectStore = adapter(place, self._transport(s3=place.scheme == "s3"))
        return made

    def _transport(self, *, s3: bool) -> Transport:
        """The connections of all S3 stores, or those of all web servers (to which no client certificate is shown)."""
        if s3 not in self._transports:
            from runner.storage.transport import Transport

            self._transports[s3] = Transport(patience=self._patience, tls=self._s3 if s3 else None)
        return self._transports[s3]
