"""The formats that Pillow and FFmpeg may open. Playlists (concat, hls, dash) are left out, since they would open other files."""

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
"""Recognised only by values in their headers, so they come last."""
Image.init()
PICTURE_FORMATS = tuple(name for name in (*_COMMON, *_RARE, *_WITHOUT_SIGNATURE) if name in Image.OPEN)
"""All formats that this Pillow opens, except EPS (it runs Ghostscript), IPTC (it holds pictures of any format, EPS too), WMF (only
Windows draws it), and formats without a decoder in Pillow (BUFR, GRIB, HDF5, MPEG).
"""
AUDIO_FORMATS = (
    "mov,matroska,webm,avi,mpegts,mpeg,flv,asf,ogg,mxf,nut,wtv,rm,dv,"
    "wav,w64,aiff,caf,au,voc,ircam,nistsphere,iff,"
    "mp3,flac,aac,loas,ac3,eac3,dts,dtshd,truehd,mlp,amr,gsm,qcp,sox,"
    "wv,tta,ape,tak,shn,mpc,mpc8,dsf"
)
"""Demuxers that FFmpeg may choose for a recording. libsndfile opens a few kinds beside them."""
VIDEO_FORMATS = (
    "mov,matroska,webm,avi,mpegts,mpeg,mpegvideo,m4v,ivf,flv,gif,asf,ogg,mxf,nut,wtv,rm,dv,"
    "h264,hevc,obu,av1,mjpeg,yuv4mpegpipe,apng,dhav"
)
"""Demuxers that FFmpeg may choose for a film. The second line has the bare streams, as cameras write them."""
