"""What an archive of ``torch.save`` may look like, before torch reads it."""

from __future__ import annotations

import io
import zipfile

from fxq.errors import FileFormatError

_OF_TORCHSCRIPT = "constants.pkl"  # where torch.load finds one, it hands the archive to torch.jit.load


def check_members(payload: bytes) -> None:
    """Verify that reading an archive takes no more memory than it has bytes, and that it is no TorchScript.

    ``torch.save`` never compresses, but torch inflates what somebody else did.

    Raises:
        FileFormatError: if it is anything else than ``torch.save`` would write.
        zipfile.BadZipFile: if it is no archive.
    """
    with zipfile.ZipFile(io.BytesIO(payload)) as archive:
        members = archive.infolist()
    if any(member.compress_type != zipfile.ZIP_STORED for member in members):
        raise FileFormatError("its content is malformed: the archive is compressed")
    if sum(member.file_size for member in members) > len(payload):
        raise FileFormatError("its content is malformed: the archive claims to hold more than the file does")
    names = {member.filename.lower() for member in members}  # torch does not tell cases apart
    if len(names) < len(members):
        raise FileFormatError("its content is malformed: the archive has two members of one name")
    if any(name.rpartition("/")[2] == _OF_TORCHSCRIPT for name in names):
        raise FileFormatError("its content is malformed: the archive is of TorchScript")
