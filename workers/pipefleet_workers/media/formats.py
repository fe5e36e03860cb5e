"""The formats that are opened at all. Those of playlists (concat, hls, dash) would open other files."""

PICTURE_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
"""Others of Pillow's formats run external programs or are rarely tested."""
AUDIO_FORMATS = "mov,matroska,webm,avi,mpegts,wav,mp3,flac,ogg,aac,aiff,amr,caf,asf"
"""Demuxers that FFmpeg may choose for a recording."""
VIDEO_FORMATS = "mov,matroska,webm,avi,mpegts,mpeg,flv,gif,asf,ogg"
"""Demuxers that FFmpeg may choose for a film."""
