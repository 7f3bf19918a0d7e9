// Package mqtt reads and writes MQTT 3.1.1 and MQTT 5 packets: a strict codec without
// I/O, the topic rules, and a small pipelined client (client.go).
//
// A frame is one whole control packet, fixed header included. PeekHeader says where a
// frame ends; the Parse functions take exactly one frame and check all that the
// specification lets a receiver check by looking at one packet. What needs the state of
// the connection stays with the caller: topic aliases and their maximum, receive
// maximum, packet ids in use, who may publish where.
//
// Who owns the bytes: the parsers of the hot path (ParsePublish, ParseDelivery, ParseAck)
// allocate nothing and give slices that alias the frame, valid as long as the frame is.
// ParseConnect, ParseSubscribe and the others give copies. The Append functions append to dst and return it. They check nothing: what they
// are given must be valid (ValidTopic, ValidFilter, lengths of at most 65535), else the
// peer will refuse it.
//
// Errors are *Error: the MQTT 5 reason code to answer with, and the normative statement
// that was broken. Allocation is bounded by the bytes that are there, never by a length
// that is merely claimed.
package mqtt
