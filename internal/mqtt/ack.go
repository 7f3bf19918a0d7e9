package mqtt

// Ack is a PUBACK, PUBREC, PUBREL or PUBCOMP (MQTT 5.0 §3.4 to §3.7).
type Ack struct {
	Type   Type
	ID     uint16
	Reason Reason // MQTT 5; else Success
	// ReasonString and Props (all properties raw) alias the frame.
	ReasonString []byte
	Props        Properties
}

var (
	errAckReason    = violation("MQTT-3.4.2-1, MQTT-3.5.2-1", "reason code is not one of PUBACK and PUBREC")
	errPubrelReason = violation("MQTT-3.6.2-1, MQTT-3.7.2-1", "reason code is not one of PUBREL and PUBCOMP")
)

// ParseAck reads any of the four acknowledgements into a, whose old contents it replaces.
// It allocates nothing on success.
func ParseAck(frame []byte, v Version, a *Ack) error {
	*a = Ack{}
	if len(frame) == 0 {
		return errFrame
	}
	t := Type(frame[0] >> 4)
	if t < TypePuback || t > TypePubcomp {
		return errTypeWrong
	}
	r, err := open(frame, t, v)
	if err != nil {
		return err
	}
	a.Type, a.ID = t, r.id()
	// From version 5 on a reason and properties may follow (§3.4.2.1, §3.4.2.2.1).
	if v == V5 && r.err == nil && len(r.b) > 0 {
		a.Reason = Reason(r.u8())
		if t <= TypePubrec && !a.Reason.allowed(inPuback) {
			return errAckReason
		}
		if t > TypePubrec && !a.Reason.allowed(inPubrel) {
			return errPubrelReason
		}
		if len(r.b) > 0 {
			a.Props, a.ReasonString = r.skipProperties(1 << t)
		}
	}
	return r.end()
}

// AppendAck appends a PUBACK, PUBREC, PUBREL or PUBCOMP: 4 bytes, or 5 with a reason other
// than Success, which only MQTT 5 has.
func AppendAck(dst []byte, t Type, id uint16, v Version, reason Reason) []byte {
	first := byte(t) << 4
	if t == TypePubrel {
		first |= 2
	}
	if v != V5 || reason == Success {
		return append(dst, first, 2, byte(id>>8), byte(id))
	}
	return append(dst, first, 3, byte(id>>8), byte(id), byte(reason))
}
