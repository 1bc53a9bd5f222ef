"""The laboratory: captioned 64x64 images whose truth can be measured."""
