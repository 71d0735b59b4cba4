"""Named memory of a device that only grows: a scan like the last one allocates nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING

from trtseg.cuda.device import OutOfDeviceMemory

if TYPE_CHECKING:
    from collections.abc import Mapping

    from trtseg.cuda.device import Bytes, Device


class Memory:
    """Device buffers and page-locked host buffers, by name.

    It owns them until `drop` or `release`; an address from it is valid until a larger size is asked
    for under that name.

    Parameters
    ----------
    device : Device
    """

    def __init__(self, device: Device) -> None:
        self._device = device
        self._buffers: dict[str, tuple[int, int]] = {}
        self._pinned: dict[str, Bytes] = {}

    def reserve(self, sizes: Mapping[str, int], purpose: str) -> None:
        """Have buffers of at least these sizes.

        Parameters
        ----------
        sizes : mapping of str to int
            Name to bytes.
        purpose : str
            What for: part of the message of an error.

        Raises
        ------
        OutOfDeviceMemory
            The device has too little; `needed` is what was missing of all the sizes together.
        """
        grown = {name: size for name, size in sizes.items() if size > self.size(name)}
        # Freed before anything is allocated: an old buffer and its successor need not fit together.
        for name in grown:
            self.drop(name)
        needed = sum(grown.values())
        try:
            for name, size in grown.items():
                self._buffers[name] = (self._device.allocate(size), size)
        except OutOfDeviceMemory as error:
            for name in grown:
                self.drop(name)
            raise OutOfDeviceMemory(needed, self._device.memory()[0], purpose) from error

    def __getitem__(self, name: str) -> int:
        """Address of a buffer."""
        return self._buffers[name][0]

    def names(self) -> list[str]:
        """Names of the buffers there are."""
        return list(self._buffers)

    def size(self, name: str) -> int:
        """Bytes of a buffer; 0 if there is none."""
        return self._buffers[name][1] if name in self._buffers else 0

    def drop(self, name: str) -> None:
        """Free a buffer, if there is one."""
        if name in self._buffers:
            self._device.free(self._buffers.pop(name)[0])

    def swap(self, one: str, other: str) -> None:
        """Exchange the names of two buffers, or of one and none."""
        held = {name: self._buffers.pop(name) for name in (one, other) if name in self._buffers}
        self._buffers.update({other if name == one else one: at for name, at in held.items()})

    def pinned(self, name: str, size: int) -> Bytes:
        """`size` bytes of page-locked memory; what was in it is lost.

        Unless it grows, the caller sees to it that no copy from or to it is under way.
        """
        held = self._pinned.get(name)
        if held is None or len(held) < size:
            if held is not None:
                self._device.synchronize()
                self._device.free_pinned(self._pinned.pop(name))
            held = self._pinned[name] = self._device.pinned(size)
        return held[:size]

    def release(self) -> None:
        """Free everything."""
        for name in list(self._buffers):
            self.drop(name)
        while self._pinned:
            self._device.free_pinned(self._pinned.popitem()[1])
