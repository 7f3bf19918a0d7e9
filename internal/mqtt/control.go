package mqtt

// Disconnect is a DISCONNECT packet (MQTT 5.0 §3.14). 3.1.1 has it without contents, from
// clients only.
type Disconnect struct {
	Reason           Reason
	HasSessionExpiry bool // clients only
	SessionExpiry    uint32
	ReasonString     string     // "": none
	ServerReference  string     // "": none; servers only
	Props            Properties // as in Publish
}

// Auth is an AUTH packet (MQTT 5.0 §3.15).
type Auth struct {
	Reason       Reason
	HasMethod    bool
	Method       string
	Data         []byte     // nil: none
	ReasonString string     // "": none
	Props        Properties // as in Publish
}

var (
	errDisconnectReason = violation("MQTT-3.14.2-1", "reason code is not one that this side may send in DISCONNECT")
	errDisconnectExpiry = violation("MQTT-3.14.2-2", "server sends a session expiry interval in DISCONNECT")
	errDisconnectRef    = violation("", "client sends a server reference in DISCONNECT")
	errDisconnect311    = violation("", "server sends DISCONNECT in MQTT 3.1.1")
	errAuthReason       = violation("MQTT-3.15.2-1", "reason code is not one of AUTH")
	errAuth311          = malformed("", "packet type 15 is reserved in MQTT 3.1.1")
	errAuthMethod       = violation("", "AUTH without an authentication method")
	errAuthUnasked      = violation("MQTT-4.12.0-7", "AUTH although CONNECT named no authentication method")
	errConnectAgain     = violation("MQTT-3.1.0-2", "second CONNECT")
	errNotFromClient    = violation("", "packet that only servers send")
)

// ParseDisconnect reads a DISCONNECT that from sent.
func ParseDisconnect(frame []byte, v Version, from Side) (*Disconnect, error) {
	r, err := open(frame, TypeDisconnect, v)
	if err != nil {
		return nil, err
	}
	d := &Disconnect{}
	if v != V5 && from == FromServer {
		return nil, errDisconnect311
	}
	if v == V5 && len(r.b) > 0 {
		d.Reason = Reason(r.u8())
		if from == FromClient && !d.Reason.allowed(inDisconnectClient) ||
			from == FromServer && !d.Reason.allowed(inDisconnectServer) {
			return nil, errDisconnectReason
		}
		if len(r.b) > 0 {
			d.parseProperties(&r, from)
		}
	}
	if err := r.end(); err != nil {
		return nil, err
	}
	return d, nil
}

func (d *Disconnect) parseProperties(r *reader, from Side) {
	w := r.properties(1 << TypeDisconnect)
	for {
		x, ok := w.next()
		if !ok {
			break
		}
		switch x.ID {
		case PropSessionExpiry:
			if from == FromServer {
				w.fail(errDisconnectExpiry)
			}
			d.HasSessionExpiry, d.SessionExpiry = true, x.Int
		case PropReasonString:
			d.ReasonString = string(x.Data)
		case PropServerReference:
			if from == FromClient {
				w.fail(errDisconnectRef)
			}
			d.ServerReference = string(x.Data)
		default: // user properties stay in Props
		}
	}
	d.Props = clone(w.into(r))
}

// AppendDisconnect appends a DISCONNECT with a reason and, unless it is empty, a reason
// string. In 3.1.1 both are left out.
func AppendDisconnect(dst []byte, v Version, reason Reason, reasonString string) []byte {
	return AppendDisconnectPacket(dst, v, &Disconnect{Reason: reason, ReasonString: reasonString})
}

// AppendDisconnectPacket appends d.
func AppendDisconnectPacket(dst []byte, v Version, d *Disconnect) []byte {
	if v != V5 {
		return append(dst, byte(TypeDisconnect)<<4, 0)
	}
	dst, mark := begin(dst, TypeDisconnect, 0)
	dst = append(dst, byte(d.Reason))
	dst, props := room(dst)
	if d.HasSessionExpiry {
		dst = appendU32Prop(dst, PropSessionExpiry, d.SessionExpiry)
	}
	if d.ReasonString != "" {
		dst = appendTextProp(dst, PropReasonString, d.ReasonString)
	}
	if d.ServerReference != "" {
		dst = appendTextProp(dst, PropServerReference, d.ServerReference)
	}
	dst = appendUser(dst, d.Props)
	if len(dst) == props+1 { // no properties: their length is left out too, and the reason if it is 0
		dst = dst[:props]
		if d.Reason == Success {
			dst = dst[:props-1]
		}
		return seal(dst, mark)
	}
	return seal(seal(dst, props), mark)
}

// ParseAuth reads an AUTH, a packet of MQTT 5.
func ParseAuth(frame []byte) (*Auth, error) {
	r, err := open(frame, TypeAuth, V5)
	if err != nil {
		return nil, err
	}
	a := &Auth{}
	if len(r.b) == 0 { // stands for Success without properties (§3.15.2.1)
		return a, nil
	}
	a.Reason = Reason(r.u8())
	if !a.Reason.allowed(inAuth) {
		return nil, errAuthReason
	}
	w := r.properties(1 << TypeAuth)
	for {
		x, ok := w.next()
		if !ok {
			break
		}
		switch x.ID {
		case PropAuthMethod:
			a.HasMethod, a.Method = true, string(x.Data)
		case PropAuthData:
			a.Data = clone(x.Data)
		case PropReasonString:
			a.ReasonString = string(x.Data)
		default: // user properties stay in Props
		}
	}
	if w.err == nil && !a.HasMethod {
		w.fail(errAuthMethod)
	}
	a.Props = clone(w.into(&r))
	if err := r.end(); err != nil {
		return nil, err
	}
	return a, nil
}

// AppendAuth appends a.
func AppendAuth(dst []byte, a *Auth) []byte {
	dst, mark := begin(dst, TypeAuth, 0)
	if a.Reason == Success && !a.HasMethod {
		return seal(dst, mark)
	}
	dst = append(dst, byte(a.Reason))
	dst, props := room(dst)
	if a.HasMethod {
		dst = appendTextProp(dst, PropAuthMethod, a.Method)
	}
	if a.Data != nil {
		dst = appendTextProp(dst, PropAuthData, a.Data)
	}
	if a.ReasonString != "" {
		dst = appendTextProp(dst, PropReasonString, a.ReasonString)
	}
	return seal(seal(appendUser(dst, a.Props), props), mark)
}

// AppendPingreq appends a PINGREQ.
func AppendPingreq(dst []byte) []byte { return append(dst, byte(TypePingreq)<<4, 0) }

// AppendPingresp appends a PINGRESP.
func AppendPingresp(dst []byte) []byte { return append(dst, byte(TypePingresp)<<4, 0) }

// ValidateFromClient checks a packet that a client sends after its CONNECT: whether it may
// send it at all, and everything in it. AUTH is always wrong, as for a server that takes
// no authentication method.
func ValidateFromClient(frame []byte, v Version) error {
	if len(frame) == 0 {
		return errFrame
	}
	var err error
	switch t := Type(frame[0] >> 4); t {
	case TypeConnect:
		return errConnectAgain
	case TypePublish:
		var p Publish
		err = ParsePublish(frame, v, &p)
	case TypePuback, TypePubrec, TypePubrel, TypePubcomp:
		var a Ack
		err = ParseAck(frame, v, &a)
	case TypeSubscribe:
		_, err = ParseSubscribe(frame, v)
	case TypeUnsubscribe:
		_, err = ParseUnsubscribe(frame, v)
	case TypePingreq:
		err = parseEmpty(frame, t, v)
	case TypeDisconnect:
		_, err = ParseDisconnect(frame, v, FromClient)
	case TypeAuth:
		if v != V5 {
			return errAuth311
		}
		if _, err = ParseAuth(frame); err == nil {
			return errAuthUnasked
		}
	case 0:
		return errTypeZero
	default:
		return errNotFromClient
	}
	return err
}

// parseEmpty checks a packet that is nothing but its fixed header.
func parseEmpty(frame []byte, t Type, v Version) error {
	r, err := open(frame, t, v)
	if err != nil {
		return err
	}
	return r.end()
}
