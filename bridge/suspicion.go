package bridge

// suspicion finds the message that an upstream cannot stand: MQTT 3.1.1 has no way to refuse one but
// to end the connection, and such a message at the head would come again for ever and hold up all
// that is behind it.
//
// A connection counts against the oldest send that it left unacked, if the upstream itself ended it
// with nothing acked. After probeAfter such kicks that send goes alone, record by record, with nothing else in flight: either it is acked
// and free of suspicion, or what follows is its doing. At the limit it is parked. Time-outs and links
// that break on the way do not count: they are nobody's fault.
type suspicion struct {
	limit int
	kicks int
	lane  int
	seq   uint64 // the suspect's first record
}

const probeAfter = 3

// kicked counts a connection that the upstream ended with nothing acked.
func (s *suspicion) kicked(lane int, seq uint64) {
	if s.kicks == 0 || s.lane != lane || s.seq != seq {
		s.lane, s.seq, s.kicks = lane, seq, 0
	}
	s.kicks++
}

// acked ends all suspicion: the upstream takes what it is given.
func (s *suspicion) acked() { s.kicks = 0 }

// probing tells whether only one send may be in flight.
func (s *suspicion) probing() bool { return s.kicks >= probeAfter }

// convicts tells whether the record is to be parked.
func (s *suspicion) convicts(lane int, seq uint64) bool {
	return s.kicks >= s.limit && s.lane == lane && s.seq == seq
}
