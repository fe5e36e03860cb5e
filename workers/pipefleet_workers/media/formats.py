"""The formats that are opened at all. Those of playlists (concat, hls, dash) would open other files."""

from __future__ import annotations

from PIL import Image

_COMMON = (
    "JPEG",
    "PNG",
    "WEBP",
    "GIF",
    "BMP",
    "TIFF",
    "PPM",
    "AVIF",
    "JPEG2000",
    "PSD",
    "ICO",
    "ICNS",
    "CUR",
    "DDS",
    "DIB",
)
_RARE = (
    "QOI",
    "SGI",
    "PCX",
    "DCX",
    "BLP",
    "FTEX",
    "MSP",
    "XBM",
    "XPM",
    "XVTHUMB",
    "SUN",
    "FLI",
    "FITS",
    "GBR",
    "MCIDAS",
    "PIXAR",
)
_WITHOUT_SIGNATURE = ("PCD", "IM", "IMT", "SPIDER", "TGA")
"""Told from what their headers hold, so they come last."""
Image.init()
PICTURE_FORMATS = tuple(name for name in (*_COMMON, *_RARE, *_WITHOUT_SIGNATURE) if name in Image.OPEN)
"""All that this Pillow opens but EPS, which runs Ghostscript; IPTC, which holds pictures of any format, EPS too; WMF, which is
drawn on Windows only; and those for which Pillow has no decoder of its own (BUFR, GRIB, HDF5, MPEG)."""
AUDIO_FORMATS = "mov,matroska,webm,avi,mpegts,wav,mp3,flac,ogg,aac,aiff,amr,caf,asf"
"""Demuxers that FFmpeg may choose for a recording."""
VIDEO_FORMATS = "mov,matroska,webm,avi,mpegts,mpeg,flv,gif,asf,ogg"
"""Demuxers that FFmpeg may choose for a film."""
