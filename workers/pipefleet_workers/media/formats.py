"""The formats that are opened at all. Those of playlists (concat, hls, dash) would open other files."""

PICTURE_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
"""Others of Pillow's formats run external programs or are rarely tested."""
AUDIO_FORMATS = (
    "mov,matroska,webm,avi,mpegts,mpeg,flv,asf,ogg,mxf,nut,wtv,rm,dv,"
    "wav,w64,aiff,caf,au,voc,ircam,nistsphere,iff,"
    "mp3,flac,aac,loas,ac3,eac3,dts,dtshd,truehd,mlp,amr,gsm,qcp,"
    "wv,tta,ape,tak,shn,mpc,mpc8,dsf"
)
"""Demuxers that FFmpeg may choose for a recording. libsndfile opens a few kinds beside them."""
VIDEO_FORMATS = "mov,matroska,webm,avi,mpegts,mpeg,mpegvideo,flv,gif,asf,ogg,mxf,nut,wtv,rm,dv"
"""Demuxers that FFmpeg may choose for a film."""
