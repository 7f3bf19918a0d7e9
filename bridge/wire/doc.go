// Package wire is the language between a gateway and the cloud: message ids, topics, the batch
// and cloudevents formats, and the announcements that a gateway makes of itself. It is described
// for other languages in docs/formats.md, whose decoders the tests of this package run.
//
// It imports nothing else of Holdfast, so that a cloud program can use it alone.
package wire
