"""Archives of strangers unpacked safely, and ours packed for every client: content decides, never a name.

`sniff` looks, `decode` decompresses, `tarread` and `zipread` list, `names` and `limits` judge, `tree` alone writes; `unpack`
puts them in a row. `pack` goes the other way.
"""

from __future__ import annotations

from runner.storage.archive.decode import Compression as Compression
from runner.storage.archive.limits import Stopped as Stopped
from runner.storage.archive.limits import UnpackLimits as UnpackLimits
from runner.storage.archive.pack import Packed as Packed
from runner.storage.archive.pack import PackStyle as PackStyle
from runner.storage.archive.pack import compression_for as compression_for
from runner.storage.archive.pack import fingerprint as fingerprint
from runner.storage.archive.pack import pack as pack
from runner.storage.archive.pack import style_for as style_for
from runner.storage.archive.sniff import Container as Container
from runner.storage.archive.sniff import Format as Format
from runner.storage.archive.unpack import Unpacked as Unpacked
from runner.storage.archive.unpack import unpack as unpack
