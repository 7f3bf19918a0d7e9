package httpapi

import "net"

// Serve makes Run accept from ln.
func (s *Server) Serve(ln net.Listener) { s.ln = ln }

// DecodeStrict is the decoder of bodies.
func DecodeStrict(b []byte, v any) error { return decodeStrict(b, v) }

// Statuses has the HTTP status of each code.
func Statuses() map[string]int { return statuses }

// MaxStreams and MaxWaiters bound what may stay.
const (
	MaxStreams = maxStreams
	MaxWaiters = maxWaiters
)

// ContentOf shows a payload.
var ContentOf = content
